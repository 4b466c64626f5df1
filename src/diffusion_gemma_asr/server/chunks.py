"""What becomes of a chunk: it is encoded with others, drafted, and decoded canvas by canvas until there is a text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from ..denoise.clip import ClipDecoding, Decoded
from ..denoise.decode import draft_clips, find_languages
from ..errors import AsrError
from ..model.drafts import Encoded
from ..model.model import DiffusionGemmaASR
from ..model.prompt import token_pieces
from ..transcribe.recordings import ChunkText, second_text, wants_another_seed, with_another_seed
from .requests import DRAFT, Task, TokenLogprobs


class Batch(NamedTuple):
    """Chunks that were encoded together."""

    tasks: list[Task]
    encoded: Encoded

    @property
    def seconds(self) -> float:
        """Of sound."""
        return sum(task.chunk.duration for task in self.tasks)


def encode_chunks(model: DiffusionGemmaASR, tasks: list[Task]) -> tuple[list[Batch], list[tuple[Task, AsrError]]]:
    """Encodes chunks; one that fails does not lose the others.

    Returns:
        batches, and what failed.
    """
    if not tasks:
        return [], []
    try:
        return [Batch(tasks, model.encode([task.chunk.samples for task in tasks]))], []
    except AsrError as error:
        if len(tasks) == 1:
            return [], [(tasks[0], error)]
    batches, failed = zip(*(encode_chunks(model, [task]) for task in tasks), strict=True)
    return list(itertools.chain(*batches)), list(itertools.chain(*failed))


def draft_chunks(model: DiffusionGemmaASR, batch: Batch, wanted: Sequence[Task]) -> list[Task]:
    """Drafts chunks of a batch and recognises their languages: those that are wanted, which then have a decoding."""
    alike: dict[tuple[str | None, tuple[str, ...], str], list[int]] = {}  # chunks that are asked for in one way
    for row, task in enumerate(batch.tasks):
        options = task.request.options.decode
        if task in wanted:
            alike.setdefault((options.start, options.codes_among(model.config.languages), options.context), []).append(row)
    for (_, codes, _), rows in alike.items():
        part = batch.encoded.pick(rows)
        options = batch.tasks[rows[0]].request.options.decode
        clips = draft_clips(model, part)
        languages = codes * len(clips)
        if len(codes) > 1:
            languages = tuple(find_languages(model, clips, codes, options, len(clips)))
        for row, clip, language in zip(rows, clips, languages, strict=True):
            task = batch.tasks[row]
            task.decoding = ClipDecoding(model, clip, task.request.options.decode, language)
            if model.config.ctc:
                task.request.show(task.place, DRAFT, task.decoding)
    return [batch.tasks[row] for row in sorted(itertools.chain(*alike.values()))]


def text_of(model: DiffusionGemmaASR, task: Task) -> ChunkText | None:
    """The text of a chunk; None where another canvas is to be denoised first: the last one was full, or repeats itself."""
    decoding, options = task.decoding, task.request.options
    assert decoding is not None
    if not decoding.done:
        return None
    decoded = decoding.decoded()
    if not task.again and wants_another_seed(decoded, options):
        other = with_another_seed(options.decode)
        task.decoding, task.again = ClipDecoding(model, decoding.clip, other, decoding.language), True
        return None
    result = second_text(decoded, options) if task.again else ChunkText(decoded)
    if options.word_timestamps:
        return result.aligned(model.align(decoding.clip.slots, result.decoded.tokens))
    return result


def token_logprobs(model: DiffusionGemmaASR, decoded: Decoded) -> TokenLogprobs:
    """What each token adds to a text, with its log-probability; tokens that share a character count together."""
    pieces = token_pieces(decoded.tokens, model.text)
    return [(text, sum(decoded.logprobs[place] for place in places)) for text, places in pieces]
