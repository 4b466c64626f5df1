"""Training. `run.train_from_recipe` does what a recipe file says; mini/ holds the earlier stages of the small models.

recipe, recipe_files   what a YAML file may say, and where files lie
adapter                the trainer of projector and LoRA, which makes a checkpoint
speech                 utterances to train on, with the frozen encoder's frames
objective, losses      what is minimised
loop                   steps, optimiser, log, exact resumption; muon, workers, fingerprint belong to it
monitor                judging a run by its transcripts
"""
