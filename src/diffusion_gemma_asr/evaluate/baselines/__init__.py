"""Baseline decoders for comparison: the backbone decoding autoregressively, and Whisper."""
