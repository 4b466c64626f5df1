"""The chat turn that carries the audio: ids with placeholder slots, and the mask of the slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import AsrError, CheckpointError
from ..languages import AUTO, LANGUAGES
from .lengths import length_mask

SPECIAL_TOKENS = {
    "pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "turn": "<|turn>", "end_of_turn": "<turn|>",
    "begin_audio": "<|audio>", "audio": "<|audio|>", "end_audio": "<audio|>",
}  # fmt: skip


def instruction(language: str | None) -> str:
    """What the prompt asks for; `language` is its English name, None where the model has to find out."""
    return "Transcribe the speech." if language is None else f"Transcribe the {language} speech."


def context_of(initial_prompt: str = "", hotwords: str = "") -> str:
    """What the prompt says about the recording: the text that came before, and words that may occur."""
    parts = {"Before it was said: ": initial_prompt.strip(), "Words that may occur: ": hotwords.strip()}
    return " ".join(f"{lead}{text.rstrip('.')}." for lead, text in parts.items() if text)


@dataclass(frozen=True)
class Prompt:
    """Prompts of a batch, padded on the right.

    ids (B, P) long; mask (B, P) bool: real tokens; slot_mask (B, P) bool: placeholders that audio tokens overwrite;
    lengths (B,) long: real tokens a row.
    """

    ids: Tensor
    mask: Tensor
    slot_mask: Tensor
    lengths: Tensor


class PromptBuilder:
    """Writes `<bos><|turn>user\\n INSTRUCTION <|audio> SLOTS <audio|><turn|>\\n<|turn>model\\n` for a tokenizer.

    The instruction stands before the audio, so that all utterances of a language share their first tokens.

    Raises:
        CheckpointError: the tokenizer lacks one of the special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS.values() if token not in vocabulary]
        if missing:
            raise CheckpointError(
                f"the backbone's tokenizer lacks {', '.join(missing)}; "
                "it is not the tokenizer of a DiffusionGemma that knows audio"
            )
        self.special = {name: vocabulary[token] for name, token in SPECIAL_TOKENS.items()}
        self._newline = self._plain("\n")

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _spelled(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a transcript on the canvas: end of turn and end of sequence."""
        return (self.special["end_of_turn"], self.special["eos"])

    def row(self, slots: int, language: str = "en", context: str = "") -> list[int]:
        """The prompt of one utterance of `slots` audio tokens.

        Args:
            language: a code, or AUTO: the prompt names none, and the transcript follows a `marker`.
            context: what stands behind the instruction, see `context_of`; special tokens spelled out in it are plain text.

        Raises:
            AsrError: `language` is none of the six, nor AUTO.
        """
        if language not in (*LANGUAGES, AUTO):
            raise AsrError(f"language {language!r} is not one of {', '.join(LANGUAGES)}, {AUTO}")
        s = self.special
        return [
            s["bos"], s["turn"], *self._plain("user\n" + instruction(LANGUAGES.get(language))),
            *(self._spelled(" " + context) if context else ()),
            s["begin_audio"], *[s["audio"]] * slots, s["end_audio"], s["end_of_turn"], *self._newline,
            s["turn"], *self._plain("model\n"),
        ]  # fmt: skip

    def marker(self, language: str) -> list[int]:
        """What stands before the transcript where the prompt names no language: its code and a newline."""
        return self._plain(language + "\n")

    def language_tokens(self, languages: Sequence[str]) -> list[int]:
        """The first token of each language's marker, by which it is recognised.

        Raises:
            CheckpointError: two languages begin alike.
        """
        first = [self.marker(code)[0] for code in languages]
        if len(set(first)) < len(first):
            raise CheckpointError("the tokenizer begins the codes of two languages with one token; name the language")
        return first

    def build(
        self,
        slot_lengths: Sequence[int],
        languages: Sequence[str],
        written: Sequence[Sequence[int]] | None = None,
        context: str | Sequence[str] = "",
    ) -> Prompt:
        """Prompts of a batch: one row per utterance, padded on the right with the pad token.

        Args:
            written: ids of each transcript's beginning, which the canvas is to go on with.
            context: see `row`; one for all rows, or one each.
        """
        contexts = [context] * len(slot_lengths) if isinstance(context, str) else context
        rows = [self.row(*parts) for parts in zip(slot_lengths, languages, contexts, strict=True)]
        for row, begun in zip(rows, written or (), strict=written is not None):
            row += [token for token in begun if token != self.special["audio"]]  # no slot but the sound's own
        return pad_prompts(rows, self.special)

    def target(self, text: str) -> list[int]:
        """The tokens a canvas should hold for `text`: the transcript and the end of the turn.

        Special tokens spelled out in the text are plain text here: a transcript cannot open a slot or end the turn.
        """
        return [*self._spelled(text), self.special["end_of_turn"]]


def pad_prompts(rows: Sequence[Sequence[int]], special: dict[str, int]) -> Prompt:
    """Rows of ids → Prompt; every `<|audio|>` in a row is a slot."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), special["pad"])
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return Prompt(ids, mask, (ids == special["audio"]) & mask, lengths)


def fill_slots(embeds: Tensor, slot_mask: Tensor, slots: Tensor, slot_lengths: Tensor) -> Tensor:
    """Overwrites the placeholders of each row with its audio tokens, in order.

    Args:
        embeds: (B, P, H); slot_mask: (B, P) bool, slot_lengths[b] placeholders in row b.
        slots: (B, S, H).
    """
    real = slots[length_mask(slot_lengths, slots.shape[1])]  # (sum of slot_lengths, H)
    return embeds.masked_scatter(slot_mask[..., None], real.to(embeds.dtype))


Decode = Callable[[Sequence[int]], str]


def token_pieces(tokens: Sequence[int], decode: Decode) -> list[tuple[str, list[int]]]:
    """What each token adds to the text, and its place; joined they are the text.

    A token that ends inside a character (bytes of it), or adds nothing but space, goes with the next one.
    """
    pieces: list[tuple[str, list[int]]] = []
    used, waiting = 0, []  # characters, and places of tokens whose characters are not used yet
    for place in range(len(tokens)):
        text = decode(tokens[: place + 1])
        waiting.append(place)
        piece = text[used:].rstrip()
        if piece and (not text.endswith("\ufffd") or place + 1 == len(tokens)):
            pieces.append((piece, waiting))
            used, waiting = used + len(piece), []
    return pieces
