"""The stage `decoder`: a Whisper's decoder learns to write while it hears nothing.

Behind silence it expects next to nothing, whatever it knows of language. After some minutes of sentences in the backbone's
tokens it is a language model of these, which decoder_backbone.py then carries over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.models.whisper.modeling_whisper import WhisperForConditionalGeneration

from ...checkpoint.parts import load_extractor, load_pretrained, load_tokenizer
from ...errors import CheckpointError
from ...model.config import BackboneConfig, EncoderConfig
from ...model.prompt import PromptBuilder
from .. import fingerprint
from ..decoder_start import readable
from ..loop import Metrics, compute_dtype, run
from ..recipe_files import PART
from ..workers import rank
from .sentences import Sentences, TextData, TextTrain, read_targets

SILENCE = -1.5  # of Whisper's log-mel spectrogram
FRAMES = 8  # of silence that the decoder hears


@dataclass(frozen=True)
class DecoderRecipe:
    """The stage `decoder`."""

    stage: Literal["decoder"]
    name: str  # of the run's folder
    whisper: str = field(metadata=PART)  # hub repository or folder of a whole Whisper
    tokenizer: Path  # folder of the backbone's
    train: TextTrain
    data: TextData


@dataclass(frozen=True)
class Spelling:
    """How a Whisper writes the tokens of a backbone.

    Attributes:
        whole: its number of each of its tokens that holds whole characters, by text.
        numbers: its number of each of the backbone's tokens that it has too.
        starts: the tokens that it begins with, by language.
    """

    whole: dict[str, int]
    numbers: dict[int, int]
    starts: dict[str, list[int]]

    @classmethod
    def of(
        cls, theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase, languages: Iterable[str], first: int
    ) -> Spelling:
        """Compares two tokenizers; `first` is what Whisper begins with where it has no tokens for these languages."""
        vocabulary = theirs.get_vocab()
        whole = {text: vocabulary[token] for token, text in readable(vocabulary).items()}
        numbers = {number: whole[text] for text, number in ours.get_vocab().items() if text in whole}
        names = {code: ("<|startoftranscript|>", f"<|{code}|>", "<|transcribe|>", "<|notimestamps|>") for code in languages}
        if any(token not in vocabulary for tokens in names.values() for token in tokens):
            return cls(whole, numbers, {code: [first] for code in languages})
        return cls(whole, numbers, {code: [vocabulary[token] for token in tokens] for code, tokens in names.items()})

    def rows(self, sentences: Sentences) -> Sentences:
        """The sentences that Whisper can write, in its tokens, with our end of turn behind them as -1."""
        kept = Sentences()
        places = iter(zip(sentences.targets, sentences.languages, strict=True))
        for size in sentences.sizes:
            before = len(kept.targets)
            for _ in range(size):
                target, code = next(places)
                if len(target) > 1 and all(token in self.numbers for token in target[:-1]):
                    kept.targets.append([*(self.numbers[token] for token in target[:-1]), -1])
                    kept.languages.append(code)
            if len(kept.targets) > before:
                kept.sizes.append(len(kept.targets) - before)
        return kept


def silence_of(whisper: Any) -> Tensor:
    """(1, FRAMES, D), what a Whisper's encoder makes of silence."""
    mel = torch.full((1, whisper.config.num_mel_bins, 2 * whisper.config.max_source_positions), SILENCE)
    return whisper.encoder(mel.to(whisper.device)).last_hidden_state[:, :FRAMES]


class Writer(nn.Module):
    """A Whisper that hears silence.

    Args:
        whisper: whole, in float32.
        spelling: of the backbone's tokenizer.
    """

    def __init__(self, whisper: Any, spelling: Spelling):
        super().__init__()
        self.decoder, self.spelling = whisper.model.decoder, spelling
        end = whisper.config.eos_token_id
        self.kept = sorted({*spelling.numbers.values(), end})
        self.places = {token: place for place, token in enumerate(self.kept)} | {-1: self.kept.index(end)}
        self.end = end
        with torch.no_grad():
            self.silence = silence_of(whisper.model)
        self.rows = whisper.proj_out.weight.detach()[self.kept].clone()  # (tokens, D)

    def losses(self, rows: Sequence[Sequence[int]], languages: Sequence[str]) -> Tensor:
        """(tokens,) nats of every token of the rows, see `Spelling.rows`, their ends included."""
        starts = [self.spelling.starts[code] for code in languages]
        begun, size = len(starts[0]), max(map(len, rows))
        ids, targets = torch.full((len(rows), begun + size - 1), self.end), torch.full((len(rows), size), -1)
        for index, (start, row) in enumerate(zip(starts, rows, strict=True)):
            ids[index, : begun + len(row) - 1] = torch.tensor([*start, *row[:-1]])
            targets[index, : len(row)] = torch.tensor([self.places[token] for token in row])
        device = self.silence.device
        ids, targets = ids.to(device), targets.to(device)
        heard = self.silence.expand(len(rows), -1, -1)
        hidden = self.decoder(input_ids=ids, encoder_hidden_states=heard).last_hidden_state[:, begun - 1 :]
        logits = F.linear(hidden[targets >= 0], self.rows.to(hidden.dtype))
        return F.cross_entropy(logits.float(), targets[targets >= 0], reduction="none")


class DecoderTrainer:
    """The callbacks of the training loop for a decoder: the loss of a step, and evaluation.

    Args:
        recipe: of the stage.
        device: to compute on.

    Attributes:
        whisper: whole; its decoder is trained.
        tokenizer: its own.
        writer: what computes its losses.
        settings: fingerprints of everything that the run depends on, by name.
    """

    def __init__(self, recipe: DecoderRecipe, device: torch.device):
        self.recipe, name, data = recipe, recipe.whisper, recipe.data
        self.whisper: Any = load_pretrained(WhisperForConditionalGeneration, name, "decoder", dtype=torch.float32).eval()
        self.tokenizer = load_tokenizer(BackboneConfig(name))
        self.prompts = PromptBuilder(load_tokenizer(BackboneConfig(str(recipe.tokenizer))))
        read = read_targets(data, self.prompts, recipe.train.seed)
        codes = dict.fromkeys([*read.languages, *data.dev])
        first = self.whisper.config.decoder_start_token_id
        self.writer = Writer(self.whisper.to(device), Spelling.of(self.tokenizer, self.prompts.tokenizer, codes, first))
        self.sentences = self.writer.spelling.rows(read)
        if not self.sentences.targets:
            raise CheckpointError(f"{name} can write none of the sentences: are its tokens those of {recipe.tokenizer}?")
        self.dev = data.dev_sentences()
        self.dtype = compute_dtype(recipe.train.dtype, device)
        self.mixture = self.sentences.mixture(data, recipe.train.batch_tokens, recipe.train.batch_size, recipe.train.seed)
        self.settings = fingerprint.of_recipe(recipe)
        self.settings["data"] = fingerprint.of_lines(map(str, self.sentences.targets))

    def loss_of(self, step: int, micro: int) -> tuple[Tensor, Metrics]:
        """The loss of one micro-batch, in nats a token."""
        chosen = self.mixture.at(step * self.recipe.train.accumulation + micro)
        rows = [self.sentences.targets[i] for i in chosen]
        loss = self._losses(rows, [self.sentences.languages[i] for i in chosen]).mean()
        return loss, {"autoregressive": float(loss.detach())}

    @torch.no_grad()
    def evaluate(self, step: int) -> Metrics:
        """Nats a character of the dev sentences that Whisper can write, by language."""
        figures: Metrics = {}
        for code, lines in self.dev.items():
            read = Sentences([self.prompts.target(line) for line in lines], [code] * len(lines), [len(lines)])
            rows = self.writer.spelling.rows(read).targets
            characters = sum(len(self._text(row)) + 1 for row in rows)  # and the end
            nats = sum(float(self._losses([row], [code]).sum()) for row in rows)
            figures |= {f"nats_a_character_{code}": round(nats / characters, 3)} if rows else {}
        return figures

    def _text(self, row: Sequence[int]) -> str:
        return self.tokenizer.decode(row[:-1]).strip()

    def _losses(self, rows: Sequence[Sequence[int]], languages: Sequence[str]) -> Tensor:
        with torch.autocast(self.writer.silence.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.writer.losses(rows, languages)


def train_decoder(recipe: DecoderRecipe, folder: Path, device: torch.device) -> Path:
    """Trains a Whisper's decoder on sentences alone, resuming an interrupted run.

    Args:
        recipe: of the stage.
        folder: of the run; gets log.jsonl, state.pt and whisper/, in Whisper's layout.
        device: to compute on.

    Returns:
        the folder of the whole Whisper.

    Raises:
        AsrError: Whisper, tokenizer, text or a saved state cannot be used.
    """
    trainer = DecoderTrainer(recipe, device)
    decoder = trainer.writer.decoder
    trained = {name: p for name, p in decoder.named_parameters() if not name.startswith("embed_")}
    run(trained, trainer.loss_of, folder, recipe.train, trainer.evaluate, trainer.settings)
    if rank() == 0:
        trainer.whisper.half().save_pretrained(folder / "whisper")
        trainer.tokenizer.save_pretrained(folder / "whisper")
        load_extractor(EncoderConfig(recipe.whisper)).save_pretrained(folder / "whisper")
    return folder / "whisper"
