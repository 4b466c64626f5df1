"""What users hold: a loaded model, and all that can be done with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..audio.read import SAMPLE_RATE, AudioSource, load_audio
from ..audio.vad import Chunk, speech_chunks
from ..denoise.clip import Decoded
from ..errors import AsrError, AudioError, DataError
from ..model.model import DiffusionGemmaASR
from ..strict import from_options
from .live import LiveUpdate, transcribe_live
from .recordings import End, ProgressCallback, TranscribeOptions, stream_many, transcribe_many
from .results import Segment, Transcript, Word
from .words import timed_words


class Recognizer:
    """A model that transcribes; `diffusion_gemma_asr.load` makes one.

    Options of its methods are the fields of `TranscribeOptions` and `DecodeOptions` by name, for instance
    `language="en", steps=4, word_timestamps=True`; or a whole `TranscribeOptions` as `options`.

    A model belongs to the process that loaded it: threads of torch do not survive a fork.
    """

    def __init__(self, model: DiffusionGemmaASR):
        self._model, self._process = model, os.getpid()

    @property
    def model(self) -> DiffusionGemmaASR:
        """The module behind it.

        Raises:
            AsrError: this process is a fork of the one that loaded it.
        """
        if os.getpid() != self._process:
            raise AsrError(
                "the model was loaded before this process was forked, and would hang here; load it in each process, "
                "or start processes with multiprocessing's 'spawn'"
            )
        return self._model

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages that it knows."""
        return self.model.config.languages

    def transcribe(
        self,
        audio: AudioSource,
        options: TranscribeOptions | None = None,
        *,
        on_progress: ProgressCallback | None = None,
        **named: Any,
    ) -> Transcript:
        """Transcribes one recording of any length.

        Args:
            audio: path, bytes, binary file object or array of samples; see `audio.read.read_blocks`.
            options: as a whole.
            on_progress: called whenever a stretch of speech is done.
            **named: options by name.

        Raises:
            AudioError: the sound cannot be used.
            AsrError: an option is unknown, has an impossible value, or the model was not trained for it.
        """
        (result,) = transcribe_many(self.model, [audio], _chosen(options, named), on_progress=on_progress)
        if isinstance(result, AudioError):
            raise result
        return result

    def stream(
        self,
        audio: AudioSource,
        options: TranscribeOptions | None = None,
        *,
        on_progress: ProgressCallback | None = None,
        **named: Any,
    ) -> Iterator[Segment]:
        """As `transcribe`, but segment by segment, as they come; the recording is read as they are asked for."""
        for _, event in stream_many(self.model, [audio], _chosen(options, named), on_progress=on_progress):
            if isinstance(event, AudioError):
                raise event
            if not isinstance(event, End):
                yield event

    def transcribe_many(
        self,
        audio: Iterable[AudioSource],
        options: TranscribeOptions | None = None,
        *,
        on_progress: ProgressCallback | None = None,
        **named: Any,
    ) -> Iterator[Transcript | AudioError]:
        """Transcribes recordings, in batches that may hold speech of several.

        Args:
            audio: as `transcribe` takes one; read as needed.
            options, on_progress, **named: see `transcribe`.

        Yields:
            for each recording, in the order given, its transcript, or the error that kept it from being read: one bad
            recording does not lose the others.
        """
        return transcribe_many(self.model, audio, _chosen(options, named), on_progress=on_progress)

    def live(
        self,
        blocks: Iterable[NDArray[np.generic]],
        options: TranscribeOptions | None = None,
        *,
        every: float = 1.0,
        **named: Any,
    ) -> Iterator[LiveUpdate]:
        """Transcribes sound while it is being recorded; see `transcribe_live`."""
        return transcribe_live(self.model, blocks, _chosen(options, named), every)

    def align(
        self, audio: AudioSource, text: str, language: str = "en", sampling_rate: int = SAMPLE_RATE
    ) -> tuple[Word, ...]:
        """When the words of a known text are said.

        Args:
            audio: at most 30 s of sound.
            text: what is said, as the model would write it.
            language: its code; in Mandarin every character is a word.
            sampling_rate: of an array, in Hz.

        Returns:
            its words, with times in seconds and the probability that CTC gives them.

        Raises:
            AudioError: the sound cannot be used.
            DataError: CTC cannot place so many tokens in so short a sound.
        """
        model, samples = self.model, load_audio(audio, sampling_rate)
        encoded = model.encode([samples])
        tokens = model.prompts.target(text)[:-1]  # without the end of the turn
        spans = model.align(encoded.slots[0], tokens)
        if spans is None:
            slots = int(encoded.slot_lengths[0])
            raise DataError(f"{len(tokens)} tokens of text do not fit into {slots} audio tokens; give less text")
        speech = list(speech_chunks([samples]))
        bounds = (speech[0].start, speech[-1].end) if speech else (0.0, len(samples) / SAMPLE_RATE)
        decoded = Decoded(text, tokens, [s.logprob for s in spans], text, [], 0, language, "draft", spans)
        return timed_words(decoded, Chunk(0.0, samples, *bounds, speech_prob=1.0), model.text, model.slot_s)


def _chosen(options: TranscribeOptions | None, named: dict[str, Any]) -> TranscribeOptions:
    """Options given as a whole or by name, not both."""
    if options is None:
        return from_options(TranscribeOptions, named)
    if named:
        raise TypeError("give options as a whole or by name, not both")
    return options
