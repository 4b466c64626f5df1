"""The training stages of the small models, for which there is no pretrained small DiffusionGemma.

Each stage is a recipe with the key `stage`, run by `diffusion-gemma-asr train`; runs/mini.sh runs them in this order:

1. tokenizer  tokenizer.py  byte-pair encoding of six languages
2. backbone   text.py       pretrains a small DiffusionGemma on text, with imitated audio tokens (slots.py)
3. adapter    ../adapter.py trains a projector by CTC, on Whisper's frames
4. reading    reading.py    trains the backbone on that projector's audio tokens (slot_bank.py)
5. ears       ears.py       trains encoder and projector on together, by CTC
6. adapter    ../adapter.py trains projector and LoRA on those ears: the model `mini`
7. bundle     bundle.py     packs all parts into one folder, to ship with the package
"""
