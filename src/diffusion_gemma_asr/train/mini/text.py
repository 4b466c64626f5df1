"""The stage `backbone`: a small DiffusionGemma becomes a language model of text.

Its prompts hold one audio token of noise, and it learns to write sentences behind them, token after token. What audio tokens
are it learns in the stage `reading`. It may begin as a Whisper's decoder (decoder_backbone.py). Languages are sampled by a
temperature, and some prompts do not name the language.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaGenerationConfig, PreTrainedTokenizerBase

from ...checkpoint.parts import load_backbone, load_tokenizer
from ...denoise.steps import DenoiseOptions
from ...model.backbone import Backbone
from ...model.config import BackboneConfig
from ...model.projector import noise
from ...model.prompt import PromptBuilder, fill_slots
from ...strict import require
from .. import fingerprint
from ..compiled import compile_layers
from ..loop import Metrics, compute_dtype, load_weights, run, step_seed
from ..objective import Losses, backbone_losses, text_batch
from ..recipe import LossRecipe
from ..recipe_files import PART
from ..workers import rank
from .backbone_config import BackboneShape, small_config
from .decoder_backbone import begin_as_decoder
from .sentences import TextData, TextTrain, read_targets
from .whisper_tokens import read_rows

# A small denoiser has high entropy, so samples at DiffusionGemma's temperatures are mostly wrong: 8 steps from the draft of
# 80 dev sentences give 51 % WER with these options, 62 % with t_max 0.8, t_min 0.4 and a bound of 0.1.
# However unsure, a canvas that stays the same is done: in half the passes the bundled model writes the same.
NEARLY_GREEDY = DenoiseOptions(steps=8, entropy_bound=10.0, t_max=0.2, t_min=0.1, confidence_threshold=10.0)
DRAWN = 5000  # sentences, of which a decoder's maps are fitted to those that it can write
LANGUAGE_ALONE = LossRecipe(diffusion=0.0, autoregressive=1.0, ctc=0.0)


@dataclass(frozen=True, kw_only=True)
class BackboneTrain(TextTrain):
    """The options of training on sentences, and what prompts and layers are like."""

    unnamed: float = 0.0  # share of prompts that do not name the language
    compile: bool = False  # compile the layers, see train/compiled.py


@dataclass(frozen=True)
class BackboneRecipe:
    """The stage `backbone`."""

    stage: Literal["backbone"]
    name: str  # of the run's folder
    tokenizer: Path  # folder
    shape: BackboneShape
    train: BackboneTrain
    data: TextData
    start_from: Path | None = None  # folder of a backbone of the same shape, with any tokenizer; see `warm_start`
    rows: Path | None = None  # rows.safetensors of the tokenizer's stage: the tokens' rows, which then do not learn
    decoder: str | None = field(
        default=None, metadata=PART
    )  # a whole Whisper: the layers begin as its decoder's; wants `rows`

    def __post_init__(self) -> None:
        if self.decoder is not None:
            require(self.start_from is None, "start_from", self.start_from, "left out: the backbone begins as 'decoder'")
            require(self.rows is not None, "rows", self.rows, "those of the Whisper that 'decoder' names")


def new_backbone(config: DiffusionGemmaConfig) -> Backbone:
    """A backbone with random weights, initialised for training."""
    backbone = Backbone.from_config(config)
    # The pad token is CTC's blank; the library initialises its embedding to zero, which has no direction.
    torch.nn.init.normal_(backbone.lm_head_weight.data[config.text_config.pad_token_id], std=backbone.hidden_size**-0.5)
    for name, parameter in backbone.named_parameters():
        # Queries and keys are normalised and not divided by sqrt(head_dim): with gains of 1 attention would start almost
        # one-hot.
        if name.endswith(("q_norm.weight", "k_norm.weight")) and "vision" not in name:
            torch.nn.init.constant_(parameter, parameter.numel() ** -0.25)
    return backbone


@torch.no_grad()
def warm_start(backbone: Backbone, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> int:
    """Initialises a backbone from another one of the same shape, whose tokenizer may differ.

    Tokens in both vocabularies keep their embeddings; new ones get random embeddings of the mean length of the old ones.

    Args:
        backbone: is overwritten.
        tokenizer: of `backbone`.
        folder: of the other backbone and its tokenizer.

    Returns:
        number of tokens in both vocabularies.

    Raises:
        CheckpointError: the folder has no backbone, or one of another shape.
    """
    source = BackboneConfig(str(folder))
    old = dict(load_backbone(source).named_parameters())
    old_ids = load_tokenizer(source).get_vocab()
    table = next(name for name in old if name.endswith("embed_tokens.weight"))
    parameters = dict(backbone.named_parameters())
    load_weights({n: p for n, p in parameters.items() if n != table}, {n: p for n, p in old.items() if n != table}, folder)
    shared = [(new, old_ids[token]) for token, new in tokenizer.get_vocab().items() if token in old_ids]
    length = old[table].norm(dim=1).mean()
    embeddings = torch.nn.functional.normalize(torch.randn_like(parameters[table]), dim=1) * length  # (V, H)
    new_rows, old_rows = (torch.tensor(ids) for ids in zip(*shared, strict=True))
    embeddings[new_rows] = old[table][old_rows]
    parameters[table].copy_(embeddings)
    return len(shared)


def keep_rows(backbone: Backbone, path: Path) -> None:
    """Gives a backbone's tokens the rows of a file, for good: they are the head of a projector that learns meanwhile.

    Raises:
        CheckpointError: there is no such file, or its rows are of other tokens or of another width.
    """
    weight = backbone.lm_head_weight
    weight.data.copy_(read_rows(path, weight.shape))
    weight.requires_grad_(False)


def train_backbone(recipe: BackboneRecipe, folder: Path, device: torch.device) -> Path:
    """Trains a backbone, resuming an interrupted run.

    Args:
        recipe: of the stage.
        folder: of the run; gets log.jsonl, state.pt and backbone/, in DiffusionGemma's layout.
        device: to compute on.

    Returns:
        the backbone's folder.

    Raises:
        AsrError: tokenizer, text, rows, `start_from` or a saved state cannot be used.
    """
    trainer = TextTrainer(recipe, device, resumed=(folder / "state.pt").exists())
    trained = {name: p for name, p in trainer.backbone.named_parameters() if "vision" not in name and p.requires_grad}
    run(trained, trainer.loss_of, folder, recipe.train, trainer.evaluate, trainer.settings)
    if rank() == 0:
        save_backbone(trainer.backbone, trainer.prompts, folder / "backbone")
    return folder / "backbone"


class TextTrainer:
    """The callbacks of the training loop for a backbone: the loss of a step, and evaluation.

    Args:
        recipe: of the stage.
        device: to compute on.
        resumed: whether a saved state takes the place of what the weights begin with: no decoder is then carried over.

    Attributes:
        backbone: to train.
        prompts: of its tokenizer.
        settings: fingerprints of everything that the run depends on, by name.
    """

    def __init__(self, recipe: BackboneRecipe, device: torch.device, resumed: bool = False):
        self.recipe, self.console = recipe, Console(stderr=True, quiet=rank() > 0)
        tokenizer = load_tokenizer(BackboneConfig(str(recipe.tokenizer)))
        self.prompts, data, train = PromptBuilder(tokenizer), recipe.data, recipe.train
        self.dtype = compute_dtype(train.dtype, device)
        self.dev = data.dev_sentences()
        self.sentences = read_targets(data, self.prompts, train.seed)
        torch.manual_seed(train.seed)
        backbone = new_backbone(small_config(tokenizer, recipe.shape))
        if recipe.start_from is not None:
            shared = warm_start(backbone, tokenizer, recipe.start_from)
            self.console.print(f"{shared} of {len(tokenizer)} tokens are those of {recipe.start_from}")
        self.settings = fingerprint.of_recipe(recipe) | {
            "data": fingerprint.of_lines(map(str, self.sentences.targets)),
            "start_from": "nothing" if recipe.start_from is None else fingerprint.of_tensors(backbone.state_dict()),
        }
        if recipe.rows is not None:
            keep_rows(backbone, recipe.rows)
            self.settings["rows"] = fingerprint.of_tensors({"rows": backbone.lm_head_weight})
        if recipe.decoder is not None and not resumed:
            every = [*zip(self.sentences.targets, self.sentences.languages, strict=True)]
            drawn = random.Random(train.seed).sample(every, min(DRAWN, len(every)))
            kept = begin_as_decoder(backbone, self.prompts, recipe.decoder, drawn)
            self.console.print(f"{recipe.decoder}: {100 * kept:.0f} % of what its decoder's last states vary by is kept")
        if train.compile:
            compile_layers(backbone)
        self.backbone = backbone.to(device)
        self.mixture = self.sentences.mixture(data, train.batch_tokens, train.batch_size, train.seed)

    def loss_of(self, step: int, micro: int) -> tuple[Tensor, Metrics]:
        """The loss of one micro-batch, in nats a token, and its parts."""
        train = self.recipe.train
        rng = random.Random(step_seed(train.seed, step, micro))
        chosen = self.mixture.at(step * train.accumulation + micro)
        targets, languages = [self.sentences.targets[i] for i in chosen], [self.sentences.languages[i] for i in chosen]
        self.backbone.train()
        losses = self._losses(targets, languages, [rng.random() < train.unnamed for _ in targets])
        return losses.total(LANGUAGE_ALONE), losses.figures()

    def _losses(self, targets: list[list[int]], languages: Sequence[str], unnamed: list[bool] | None = None) -> Losses:
        backbone, device, count = self.backbone, self.backbone.device, len(targets)
        ones = torch.ones(count, dtype=torch.long)
        batch = text_batch(self.prompts, ones.tolist(), targets, languages, 0, unnamed).to(device)
        slots = noise(count, backbone.hidden_size, backbone.embedding_scale())[:, None].to(device)  # (B, 1, H)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            embeds = fill_slots(backbone.embed(batch.ids), batch.slot_mask, slots, ones.to(device))
            return backbone_losses(backbone, embeds, batch, LANGUAGE_ALONE)

    @torch.no_grad()
    def evaluate(self, step: int) -> Metrics:
        """Nats a character of the dev sentences, by language."""
        self.backbone.eval()
        figures: Metrics = {}
        for code, lines in self.dev.items():
            rows = [self.prompts.target(line) for line in lines]
            means = [self._losses([row], [code]).total(LANGUAGE_ALONE) for row in rows]
            nats = sum(float(mean) * len(row) for mean, row in zip(means, rows, strict=True))
            figures[f"nats_a_character_{code}"] = round(nats / sum(len(line) + 1 for line in lines), 3)  # and the end
        self.console.print(str(figures), markup=False)
        return figures


def save_backbone(backbone: Backbone, prompts: PromptBuilder, folder: Path) -> None:
    """Writes weights (float16), tokenizer and generation settings in the layout of google/diffusiongemma-26B-A4B-it."""
    model = backbone.model
    model.generation_config = DiffusionGemmaGenerationConfig(
        max_new_tokens=64,
        max_denoising_steps=48,
        t_min=NEARLY_GREEDY.t_min,
        t_max=NEARLY_GREEDY.t_max,
        stability_threshold=NEARLY_GREEDY.stability_threshold,
        confidence_threshold=NEARLY_GREEDY.confidence_threshold,
        sampler_config={"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": NEARLY_GREEDY.entropy_bound},
        bos_token_id=prompts.special["bos"],
        pad_token_id=prompts.special["pad"],
        eos_token_id=[prompts.special["eos"], prompts.special["end_of_turn"]],
    )
    model.half().save_pretrained(folder)
    model.float()
    prompts.tokenizer.save_pretrained(folder)
