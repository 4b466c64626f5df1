"""Sound: any file, bytes, array or pipe as a stream of mono 16 kHz (`read.py`), cut into chunks of speech (`vad.py`)."""

from .read import SAMPLE_RATE, load_audio, read_blocks

__all__ = ["SAMPLE_RATE", "load_audio", "read_blocks"]
