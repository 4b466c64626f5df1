"""The stage `hearing`: a small backbone that begins as a Whisper's decoder, and hears as that does.

1. The decoder learns to read audio tokens and to write the backbone's tokens (listener.py).
2. Its layers are carried over into a DiffusionGemma's (carry_over.py),
3. which learn on over text alone, hearing audio tokens as they come from the projector (text_layers.py).
4. Audio tokens go through all layers (join_audio.py): a backbone like any other, which goes on in the stage `reading`.

The first and the third are runs of their own, which go on where they were interrupted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ...checkpoint.parts import load_encoder, load_tokenizer
from ...data.augment import mask_bands
from ...data.text import plain_text
from ...model.config import BackboneConfig, EncoderConfig
from ...model.encoder import AcousticEncoder
from ...model.projector import of_slots
from ...model.prompt import PromptBuilder
from ...strict import require
from .. import fingerprint
from ..decoder_start import ACOUSTIC
from ..loop import STATE, LoopOptions, Metrics, compute_dtype, load_weights, run
from ..recipe import DataRecipe, TrainRecipe
from ..recipe_files import PART
from ..speech import SpeechData
from ..workers import rank, wait_for_all
from .acoustic_tokens import AcousticTokens, HeardUtterance, with_constant
from .backbone_config import BackboneShape, small_config
from .carry_over import carry_over
from .join_audio import LOUD, join_audio
from .listener import load_listener
from .text import new_backbone, save_backbone
from .text_layers import TextLayers, text_rows
from .whisper_tokens import read_rows

LONGEST = 700  # frames of an utterance that maps are fitted to
CARRIED = "carried.pt"


@dataclass(frozen=True)
class HearingRecipe:
    """The stage `hearing`."""

    stage: Literal["hearing"]
    name: str  # of the run's folder
    whisper: str = field(metadata=PART)  # hub repository or folder of a whole Whisper
    encoder: EncoderConfig  # whose frames it hears
    tokenizer: Path  # folder of the backbone's
    rows: Path  # rows.safetensors of the tokenizer's stage, which do not learn
    languages: tuple[str, ...]  # codes
    shape: BackboneShape
    listener: LoopOptions  # of the run of Whisper's decoder
    train: TrainRecipe  # of the run of the backbone's layers; batches and masks are those of both
    data: DataRecipe
    stride: int = 4  # encoder frames of an audio token: the product of the projector's strides
    fitted: int = 900  # utterances that the layers are fitted to

    def __post_init__(self) -> None:
        require(self.stride >= 1, "stride", self.stride, "at least 1")
        require(self.fitted >= 1, "fitted", self.fitted, "at least 1")


class HearingTrainer:
    """The callbacks of both runs: the loss of a step, and evaluation.

    Args:
        recipe: of the stage.
        folder: of the stage.
        device: to compute on.

    Attributes:
        listener: Whisper's decoder.
        layers: of the backbone, over text; acoustic: the projector's map of frames to audio tokens.
        settings: fingerprints of everything that the runs depend on, by name.
    """

    def __init__(self, recipe: HearingRecipe, folder: Path, device: torch.device):
        self.recipe, self.device = recipe, device
        self.dtype = compute_dtype(recipe.train.dtype, device)
        tokenizer = load_tokenizer(BackboneConfig(str(recipe.tokenizer)))
        self.prompts = PromptBuilder(tokenizer)
        encoder: AcousticEncoder = load_encoder(recipe.encoder, device=device)
        self.data = SpeechData(recipe.data, recipe.train, recipe.languages, encoder, folder)
        self.targets = [self.prompts.target(text) for text in self.data.texts]
        torch.manual_seed(recipe.train.seed)
        backbone = new_backbone(small_config(tokenizer, recipe.shape))
        rows = read_rows(recipe.rows, backbone.lm_head_weight.shape)
        self.layers = TextLayers(backbone)
        kind = backbone.config.layer_types[0]
        speeds = getattr(self.layers.encoder.rotary_emb, f"{kind}_inv_freq")
        self.listener, self.factor = load_listener(
            recipe.whisper, tokenizer, rows, recipe.languages, recipe.stride, speeds[speeds > 0].clone()
        )
        turned, self.turn = with_constant(rows)
        backbone.lm_head_weight.data.copy_(turned)
        backbone.lm_head_weight.requires_grad_(False)
        width = backbone.hidden_size
        self.acoustic = nn.Conv1d(width, width, recipe.stride, recipe.stride)
        for module in (self.listener, self.layers, self.acoustic):
            module.to(device)
        self.settings = fingerprint.of_recipe(recipe) | {
            "encoder": fingerprint.of_tensors(encoder.state_dict()),
            "listener": fingerprint.of_tensors(self.listener.state_dict()),
            "data": fingerprint.of_utterances(self.data.utterances),
        }

    def batch(self, index: int) -> tuple[Tensor, Tensor, list[list[int]], list[str]]:
        """Frames (B, F, D) with masks, their lengths (B,), targets and languages of a batch of the mixture."""
        chosen = self.data.mixture.at(index)
        utterances = [self.data.utterances[i] for i in chosen]
        frames, lengths = self.data.cache.batch(utterances)
        frames = mask_bands(frames.float(), lengths, self.recipe.train.spec_augment)
        targets = [self.targets[i] for i in chosen]
        return frames.to(self.device), lengths.to(self.device), targets, [u.language for u in utterances]

    def numbers(self, languages: Sequence[str]) -> Tensor:
        """(B,) the languages' numbers."""
        return torch.tensor([self.recipe.languages.index(code) for code in languages], device=self.device)

    def heard_by_listener(self, frames: Tensor, lengths: Tensor, targets: list[list[int]], languages: list[str]) -> Tensor:
        """Logits (N, V) of all the targets' tokens."""
        return self.listener.logits(frames, lengths, targets, self.numbers(languages))

    def heard_by_layers(self, frames: Tensor, lengths: Tensor, targets: list[list[int]], languages: list[str]) -> Tensor:
        """The same by the backbone's layers."""
        counts = (lengths + self.recipe.stride - 1) // self.recipe.stride
        tokens = of_slots(self.acoustic, frames, int(counts.max()))
        rows = text_rows(self.prompts, counts.tolist(), languages, targets)
        rows = rows._replace(**{name: value.to(self.device) for name, value in rows._asdict().items()})
        return self.layers.backbone.head.logits(self.layers(rows, tokens, counts)[rows.spoken])

    def nats(self, logits: Tensor, targets: list[list[int]]) -> Tensor:
        """The mean cross-entropy of the targets' tokens."""
        wanted = torch.cat([torch.tensor(target) for target in targets]).to(logits.device)
        return F.cross_entropy(logits.float(), wanted)

    def loss_of_listener(self, step: int, micro: int) -> tuple[Tensor, Metrics]:
        """The loss of one micro-batch, in nats a token."""
        batch = self.batch(step * self.recipe.listener.accumulation + micro)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.nats(self.heard_by_listener(*batch), batch[2])
        return loss, {"listener": float(loss.detach())}

    def loss_of_layers(self, step: int, micro: int) -> tuple[Tensor, Metrics]:
        """The same for the backbone's layers, which go on where the listener's batches end."""
        met = self.recipe.listener.steps * self.recipe.listener.accumulation
        batch = self.batch(met + step * self.recipe.train.accumulation + micro)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.nats(self.heard_by_layers(*batch), batch[2])
        return loss, {"layers": float(loss.detach())}

    @torch.no_grad()
    def judge(self, heard: Any) -> Metrics:
        """Nats a token of each dev list, by what gives logits."""
        figures: Metrics = {}
        plain = self.recipe.data.transcript == "plain"
        for name, code, utterances in self.data.dev_by_language():
            frames, lengths = self.data.cache.batch(utterances)
            texts = [plain_text(u.text, code) if plain else u.text.strip() for u in utterances]
            targets, languages = [self.prompts.target(text) for text in texts], [code] * len(texts)
            logits = heard(frames.float().to(self.device), lengths.to(self.device), targets, languages)
            figures[f"nats_a_token_{name}"] = round(float(self.nats(logits, targets)), 3)
        return figures

    @torch.no_grad()
    def utterances(self) -> list[int]:
        """Training utterances to fit maps to, drawn at random among those that are not long."""
        order = list(range(len(self.targets)))
        random.Random(self.recipe.train.seed).shuffle(order)
        short = [i for i in order if len(self.targets[i]) > 1 and self.data.cache.length(self.data.utterances[i]) <= LONGEST]
        return short[: self.recipe.fitted]

    @torch.no_grad()
    def carry_over(self) -> float:
        """Fills the layers with the listener's; returns the share of the last hidden states' variance that is kept."""
        heard = []
        for i in self.utterances():
            utterance = self.data.utterances[i]
            frames, lengths = self.data.cache.batch([utterance])
            tokens, counts = self.listener.hear(frames.float().to(self.device), lengths.to(self.device))
            language = self.recipe.languages.index(utterance.language)
            heard.append(HeardUtterance(tokens[0, : int(counts[0])].cpu(), self.targets[i][:-1], language))
        for module in (self.listener, self.layers, self.acoustic):
            module.cpu()
        tokens_of = AcousticTokens.of(heard, self.turn)
        kept = carry_over(self.listener, self.layers, tokens_of, self.prompts, heard, self.recipe.languages, self.factor)
        self.acoustic.load_state_dict(tokens_of.projection(self.listener).state_dict())
        for module in (self.listener, self.layers, self.acoustic):
            module.to(self.device)
        return kept

    @torch.no_grad()
    def join_audio(self) -> list[float]:
        """Takes audio tokens through the layers; returns the share of the keys' square that is kept, layer by layer."""
        heard = []
        for i in self.utterances():
            utterance = self.data.utterances[i]
            frames, _ = self.data.cache.batch([utterance])
            count = -(-frames.shape[1] // self.recipe.stride)
            tokens = of_slots(self.acoustic, frames.float().to(self.device), count)[0]
            heard.append((tokens.cpu(), utterance.language, self.targets[i][:-1]))
        self.layers.cpu()
        return join_audio(self.layers, self.prompts, heard)

    def trained_layers(self) -> dict[str, nn.Parameter]:
        """What learns over text: the encoder's layers and last norm, and the maps of audio tokens."""
        parameters = {f"layers.{name}": p for name, p in self.layers.named_parameters()}
        parameters |= {f"acoustic.{name}": p for name, p in self.acoustic.named_parameters()}
        apart = ("vision", "self_conditioning")
        return {name: p for name, p in parameters.items() if p.requires_grad and not any(part in name for part in apart)}


def train_hearing(recipe: HearingRecipe, folder: Path, device: torch.device) -> Path:
    """Makes a backbone that hears, resuming an interrupted run.

    Args:
        recipe: of the stage.
        folder: of the stage; gets listener/ and layers/, each with log.jsonl and state.pt, backbone/ in DiffusionGemma's
            layout, and acoustic.safetensors, which `train.acoustic` of a projector's recipe names.
        device: to compute on.

    Returns:
        the backbone's folder.

    Raises:
        AsrError: Whisper, encoder, tokenizer, rows, data or a saved state cannot be used.
    """
    console = Console(stderr=True, quiet=rank() > 0)
    trainer = HearingTrainer(recipe, folder, device)
    listens = {name: p for name, p in trainer.listener.named_parameters() if p.requires_grad}
    run(
        listens,
        trainer.loss_of_listener,
        folder / "listener",
        recipe.listener,
        lambda _: trainer.judge(trainer.heard_by_listener),
        trainer.settings,
    )
    learns, begun = trainer.trained_layers(), folder / CARRIED
    if not begun.exists() and not (folder / "layers" / STATE).exists():
        if rank() == 0:
            console.print(f"carrying {recipe.whisper} over into the backbone's layers")
            console.print(f"{trainer.carry_over():.0%} of the last hidden states' variance is kept")
            torch.save({name: p.detach() for name, p in learns.items()}, begun)
        wait_for_all()
    if begun.exists():
        load_weights(learns, torch.load(begun, map_location="cpu", weights_only=True), begun)
    run(
        learns,
        trainer.loss_of_layers,
        folder / "layers",
        recipe.train,
        lambda _: trainer.judge(trainer.heard_by_layers),
        trainer.settings,
    )
    if rank() == 0:
        kept = ", ".join(f"{share:.1%}" for share in trainer.join_audio())
        console.print(f"audio tokens go through the layers, where {kept} of the keys are kept")
        save_backbone(trainer.layers.backbone, trainer.prompts, folder / "backbone")
        scale = torch.tensor(LOUD)
        made = {name: tensor.cpu().contiguous() for name, tensor in trainer.acoustic.state_dict().items()}
        save_file(made | {"scale": scale}, folder / ACOUSTIC)
    return folder / "backbone"
