"""The systems that ours is compared with: each turns a batch of clips into texts, as evaluate/systems.py asks."""
