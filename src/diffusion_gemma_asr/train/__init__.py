"""Training. `run.train_from_recipe` runs the stage of a recipe file; mini/ has the earlier stages of the small models.

recipe, recipe_files   the options of a recipe, and reading it from YAML
adapter                trains projector and LoRA, and writes a checkpoint
speech                 training and dev utterances, with the frozen encoder's frames
objective, losses      the training losses
loop                   steps, optimiser, log, exact resumption; uses muon, workers, fingerprint
monitor                evaluation of transcripts during training
"""
