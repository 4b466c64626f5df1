"""Other decoders on the same sound, to compare with: the backbone token after token, and Whisper."""
