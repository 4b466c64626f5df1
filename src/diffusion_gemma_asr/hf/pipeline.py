"""transformers' speech recognition pipeline for our model: its inputs and outputs around `Recognizer.transcribe_many`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers.pipelines.base import ChunkPipeline

from ..audio.read import AudioSource, load_audio
from ..errors import AsrError, AudioError
from ..strict import from_options, option_names
from ..transcribe.recordings import TranscribeOptions
from ..transcribe.results import Segment, Transcript, joiner
from .model import DiffusionGemmaASRForSpeechSeq2Seq

TASK = "automatic-speech-recognition"

# Options of TranscribeOptions that the pipeline has under other names, or takes from its inputs.
_RENAMED = ("batch_size", "sampling_rate", "word_timestamps", "chunk_length")
_OPTIONS = tuple(name for name in option_names(TranscribeOptions) if name not in _RENAMED)

ReturnTimestamps = Literal[True, False, "word"]


class DiffusionGemmaASRPipeline(ChunkPipeline):
    """Speech recognition with our model, created by `pipeline("automatic-speech-recognition", model=folder)`.

    Tokenizer and feature extractor default to the model's.

    Args:
        model: from `DiffusionGemmaASRForSpeechSeq2Seq.from_pretrained`.
        batch_size: chunks of at most 30 s in a batch, which may be of several recordings.
        **kwargs: arguments of every pipeline, such as `device`; arguments of `__call__`, as defaults for all calls.
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, model: DiffusionGemmaASRForSpeechSeq2Seq, batch_size: int | None = None, **kwargs: Any):
        if kwargs.get("tokenizer") is None:
            kwargs["tokenizer"] = model.asr.tokenizer
        if kwargs.get("feature_extractor") is None:
            kwargs["feature_extractor"] = model.asr.encoder.extractor
        super().__init__(model, batch_size=batch_size or TranscribeOptions.batch_size, **kwargs)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Transcribes one recording or several, of any length.

        Args:
            inputs: path or bytes of a sound file; array or tensor, (n,) or (channels, n), at 16 kHz; a dict with
                "sampling_rate" (Hz) and such an array as "raw" or "array", whose other keys are returned, each value in a
                list; or a decoder of torchcodec. A list of these, or a generator or data set, which is read as needed.
            return_timestamps: True for "chunks", the segments with their start and end in seconds; "word" for words.
            chunk_length_s: length of a chunk, at most and by default 30 s. Chunks are cut in silence, without overlap.
            batch_size: see the class.
            generate_kwargs: options of `Recognizer.transcribe`, such as `language`, `seed`, `steps`; they may also be given
                directly.

        Returns:
            {"text": ..., "chunks": [{"text": ..., "timestamp": (start, end)}, ...]}, where the concatenated texts of the
            chunks are the whole text; a list of these for a list, an iterator for a generator or data set.

        Raises:
            AudioError: a recording cannot be used.
            AsrError: an option is unknown, or its value impossible.
        """
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes the model's checkpoint, from which the pipeline can be loaded."""
        self.model.save_pretrained(save_directory)

    def _sanitize_parameters(
        self,
        return_timestamps: ReturnTimestamps | None = None,
        chunk_length_s: float | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Splits the arguments of a call into those of preprocess, _forward and postprocess."""
        options = {**(generate_kwargs or {}), **others}
        if unknown := sorted(options.keys() - set(_OPTIONS)):
            known = ", ".join(("return_timestamps", "chunk_length_s", "batch_size", *_OPTIONS))
            raise AsrError(f"{unknown[0]} is no option of this pipeline; leave it out, or give one of {known}")
        if chunk_length_s:  # 0 is the library's default
            options["chunk_length"] = float(chunk_length_s)
        if return_timestamps is None:
            return {}, options, {}
        if return_timestamps not in (True, False, "word"):
            raise AsrError(f"return_timestamps is {return_timestamps!r}; give True for segments, or 'word'")
        options["word_timestamps"] = return_timestamps == "word"
        return {}, options, {"return_timestamps": return_timestamps}

    def preprocess(self, inputs: Any) -> tuple[AudioSource, dict[str, Any]]:
        """Converts one input to a source for `transcribe_many`, and the keys to add to its answer."""
        if isinstance(inputs, str) and inputs.startswith(("http://", "https://")):
            raise AudioError(f"{inputs}: addresses are not fetched; download the file and give its path")
        if hasattr(inputs, "get_all_samples"):  # a decoder of torchcodec, from the library `datasets`
            decoded = inputs.get_all_samples()
            inputs = {"array": decoded.data, "sampling_rate": decoded.sample_rate}
        if not isinstance(inputs, dict):
            return _plain(inputs), {}
        extra = dict(inputs)
        rate, raw, array = (extra.pop(key, None) for key in ("sampling_rate", "raw", "array"))
        samples = array if raw is None else raw
        if rate is None or samples is None:
            raise AudioError(f"a dict with {', '.join(map(repr, inputs))}; give 'array' or 'raw', and 'sampling_rate' in Hz")
        if "stride" in extra:
            raise AudioError("a dict with 'stride', which this model has no use for; leave it out and give the whole sound")
        extra.pop("path", None)
        return load_audio(np.asarray(_plain(samples)), int(rate)), extra

    def _forward(self, sources: Iterable[AudioSource], options: TranscribeOptions) -> Iterator[Transcript]:
        """The transcripts of sources, in order; raises the AudioError of a source that cannot be used."""
        for result in self.model.recognizer.transcribe_many(sources, options):
            if isinstance(result, AudioError):
                raise result
            yield result

    def postprocess(
        self, transcript: Transcript, extra: dict[str, Any], return_timestamps: ReturnTimestamps = False
    ) -> dict[str, Any]:
        """Converts a transcript to the pipeline's answer."""
        answer: dict[str, Any] = {"text": transcript.text}
        if return_timestamps:
            chunks: list[dict[str, Any]] = []
            for segment in transcript.segments:
                spans = _words(segment) if return_timestamps == "word" else [(segment.text, segment.start, segment.end)]
                for i, (text, start, end) in enumerate(spans):
                    if chunks and i == 0 and text:  # so that the chunks' texts concatenate to the whole text
                        text = joiner(transcript.language) + text
                    if text:
                        chunks.append({"text": text, "timestamp": (start, end)})
            answer["chunks"] = chunks
        return answer | {key: [value] for key, value in extra.items()}

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[dict[str, Any]]:
        """Answers for all inputs, by one `transcribe_many`, whose batches may have chunks of several recordings."""
        named = {"batch_size": batch_size} | forward_params
        options = from_options(TranscribeOptions, named)  # raises here, before the first answer is requested
        extras: deque[dict[str, Any]] = deque()

        def sources() -> Iterator[AudioSource]:
            for item in (inputs[i] for i in range(len(inputs))) if hasattr(inputs, "__len__") else inputs:
                source, extra = self.preprocess(item, **preprocess_params)
                extras.append(extra)
                yield source

        transcripts = self._forward(sources(), options)
        return (self.postprocess(result, extras.popleft(), **postprocess_params) for result in transcripts)


def beside(other: type) -> type:
    """A class for the pipeline registry that creates our pipeline for our model, and `other` for every other model."""

    class SpeechRecognitionPipelines(other):
        def __new__(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
            ours = isinstance(model, DiffusionGemmaASRForSpeechSeq2Seq)
            return (DiffusionGemmaASRPipeline if ours else other)(model, *args, **kwargs)

    return SpeechRecognitionPipelines


def _plain(sound: Any) -> Any:
    """Converts a tensor to an array; returns anything else unchanged."""
    if not isinstance(sound, torch.Tensor):
        return sound
    sound = sound.detach().cpu()
    return (sound.float() if sound.is_floating_point() else sound).numpy()


def _words(segment: Segment) -> list[tuple[str, float, float]]:
    """(word, start, end) of a segment, in seconds."""
    return [(word.word, word.start, word.end) for word in segment.words or ()]
