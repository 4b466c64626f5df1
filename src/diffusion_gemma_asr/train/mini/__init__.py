"""The ladder of the small models: what comes before an adapter, since there is no small DiffusionGemma to begin with.

Each stage is a recipe with the key `stage`, done by `diffusion-gemma-asr train`; runs/mini.sh does them in this order:

1. tokenizer  tokenizer.py  byte pairs of six languages
2. backbone   text.py       a small DiffusionGemma, from nothing, on text: reads imitated audio tokens (slots.py)
3. adapter    ../adapter.py a projector alone, by CTC, on Whisper's frames
4. reading    reading.py    that backbone and projector together, on real audio tokens
5. encoder    distill.py    an encoder of our own learns from Whisper's frames, and by CTC
6. adapter    ../adapter.py projector and LoRA: the models `base` and `mini`
7. bundle     bundle.py     all parts in one folder, packed, as the package carries it
"""
