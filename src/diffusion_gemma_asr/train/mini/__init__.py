"""The training stages of the small models, for which there is no pretrained small DiffusionGemma.

Each stage is a recipe with the key `stage`, run by `diffusion-gemma-asr train`; runs/mini.sh runs them in this order:

1. tokenizer  tokenizer.py  byte-pair encoding of six languages
2. decoder    decoder_text.py  makes a language model of a Whisper's decoder
3. backbone   text.py       a small DiffusionGemma that begins as it (decoder_backbone.py), trained on text on
4. adapter    ../adapter.py trains a projector by CTC, on Whisper's frames
5. reading    reading.py    trains the backbone on that projector's audio tokens (slot_bank.py)
6. ears       ears.py       trains encoder and projector on together, by CTC
7. adapter    ../adapter.py trains projector and LoRA on those ears: the model `mini`
8. bundle     bundle.py     packs all parts into one folder, to ship with the package

On trial in place of the second and third is the stage hearing (hearing.py): a Whisper's decoder that reads audio tokens
(listener.py) is carried over into DiffusionGemma's layers (carry_over.py, text_layers.py, join_audio.py).
"""
