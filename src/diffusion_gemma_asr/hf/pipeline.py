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

# Options of ours that the pipeline has under other names, or finds in its inputs.
_RENAMED = ("batch_size", "sampling_rate", "word_timestamps", "chunk_length")
_OPTIONS = tuple(name for name in option_names(TranscribeOptions) if name not in _RENAMED)

ReturnTimestamps = Literal[True, False, "word"]


class DiffusionGemmaASRPipeline(ChunkPipeline):
    """Speech recognition with our model.

    `pipeline("automatic-speech-recognition", model=folder)` makes it. The tokenizer and feature extractor are the model's.

    Args:
        model: what `DiffusionGemmaASRForSpeechSeq2Seq.from_pretrained` returned.
        batch_size: chunks of at most 30 s that the model takes at once, of several recordings together.
        **kwargs: `device` and the like as of every pipeline; anything that a call takes, for all calls.
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
        """Transcribe one recording or several, of any length.

        Args:
            inputs: path or bytes of a sound file; array or tensor, (n,) or (channels, n), at 16 kHz; a dict with
                "sampling_rate" (Hz) and such an array as "raw" or "array", whose other keys are handed on in lists; or a
                decoder of torchcodec. A list of these, or a generator or data set, which is read as needed.
            return_timestamps: True for "chunks", the segments with their start and end in seconds; "word" for words.
            chunk_length_s: length of a chunk, at most and by default 30 s. Chunks are cut in silence, without overlap.
            batch_size: see the class.
            generate_kwargs: options of `Recognizer.transcribe`, such as `language`, `seed`, `steps`; they may also be given
                as they are.

        Returns:
            {"text": ..., "chunks": [{"text": ..., "timestamp": (start, end)}, ...]}, the texts of the chunks making up
            the whole; a list of these for a list, an iterator for a generator or data set.

        Raises:
            AudioError: a recording cannot be used.
            AsrError: an option is unknown, or its value impossible.
        """
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the model's checkpoint, which names all that the pipeline needs."""
        self.model.save_pretrained(save_directory)

    def _sanitize_parameters(
        self,
        return_timestamps: ReturnTimestamps | None = None,
        chunk_length_s: float | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Arguments of a call → those of preprocess, _forward and postprocess."""
        options = {**(generate_kwargs or {}), **others}
        if odd := sorted(options.keys() - set(_OPTIONS)):
            known = ", ".join(("return_timestamps", "chunk_length_s", "batch_size", *_OPTIONS))
            raise AsrError(f"{odd[0]} is no option of this pipeline; leave it out, or give one of {known}")
        if chunk_length_s:  # 0 is the library's word for no wish
            options["chunk_length"] = float(chunk_length_s)
        if return_timestamps is None:
            return {}, options, {}
        if return_timestamps not in (True, False, "word"):
            raise AsrError(f"return_timestamps is {return_timestamps!r}; give True for segments, or 'word'")
        options["word_timestamps"] = return_timestamps == "word"
        return {}, options, {"return_timestamps": return_timestamps}

    def preprocess(self, inputs: Any) -> tuple[AudioSource, dict[str, Any]]:
        """One input → what `transcribe_many` takes, and the keys to hand on to its answer."""
        if isinstance(inputs, str) and inputs.startswith(("http://", "https://")):
            raise AudioError(f"{inputs}: addresses are not fetched; download the file and give its path")
        if hasattr(inputs, "get_all_samples"):  # torchcodec's decoder, as data sets hand it out
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
        for result in self.model.recognizer.transcribe_many(sources, options):
            if isinstance(result, AudioError):
                raise result
            yield result

    def postprocess(
        self, transcript: Transcript, extra: dict[str, Any], return_timestamps: ReturnTimestamps = False
    ) -> dict[str, Any]:
        """A transcript → the pipeline's answer."""
        answer: dict[str, Any] = {"text": transcript.text}
        if return_timestamps:
            chunks: list[dict[str, Any]] = []
            for segment in transcript.segments:
                timed = _words(segment) if return_timestamps == "word" else [(segment.text, segment.start, segment.end)]
                for place, (text, start, end) in enumerate(timed):
                    if chunks and place == 0 and text:  # so that the chunks' texts make up the whole
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
        """All inputs through one `transcribe_many`, which fills its batches with chunks of several."""
        named = {"batch_size": batch_size} | forward_params
        options = from_options(TranscribeOptions, named)  # complains now, not at the first answer
        extras: deque[dict[str, Any]] = deque()

        def sources() -> Iterator[AudioSource]:
            for item in (inputs[i] for i in range(len(inputs))) if hasattr(inputs, "__len__") else inputs:
                source, extra = self.preprocess(item, **preprocess_params)
                extras.append(extra)
                yield source

        transcripts = self._forward(sources(), options)
        return (self.postprocess(result, extras.popleft(), **postprocess_params) for result in transcripts)


def beside(other: type) -> type:
    """A class for the pipeline registry that makes our pipeline for our model, and an `other` for every other one."""

    class SpeechRecognitionPipelines(other):
        def __new__(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
            ours = isinstance(model, DiffusionGemmaASRForSpeechSeq2Seq)
            return (DiffusionGemmaASRPipeline if ours else other)(model, *args, **kwargs)

    return SpeechRecognitionPipelines


def _plain(sound: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    if not isinstance(sound, torch.Tensor):
        return sound
    sound = sound.detach().cpu()
    return (sound.float() if sound.is_floating_point() else sound).numpy()


def _words(segment: Segment) -> list[tuple[str, float, float]]:
    return [(word.word, word.start, word.end) for word in segment.words or ()]
