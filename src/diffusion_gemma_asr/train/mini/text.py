"""The stage `backbone`: a small DiffusionGemma, trained from nothing on text.

It learns to read: every prompt holds a sentence as imitated audio tokens (slots.py), the clean sentence is the
transcript on the canvas and, for the autoregressive loss, behind the prompt. A share of the prompts holds no sentence
at all, which keeps the backbone a language model. Languages are mixed by a temperature, and some prompts do not name
theirs. Training begins with clean slots and many sentences of random tokens, where nothing but reading helps; once it can
read, the slots grow noisy and real sentences take over.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaGenerationConfig, PreTrainedTokenizerBase

from ...checkpoint.parts import load_backbone, load_tokenizer
from ...data.batches import Mixture, tempered
from ...denoise.canvas import EditCanvases, edit_canvases, uniform_canvas
from ...denoise.steps import DenoiseOptions, cut_at_end, denoise
from ...evaluate.metrics import error_rate
from ...model.backbone import Backbone
from ...model.config import BackboneConfig
from ...model.prompt import PromptBuilder
from ...strict import require
from .. import fingerprint
from ..loop import LoopOptions, Metrics, compute_dtype, load_weights, run, step_seed
from ..objective import TextBatch, backbone_losses, text_batch
from ..recipe import LossRecipe
from ..workers import rank
from .backbone_config import BackboneShape, small_config
from .slots import SlotNoise, collapsed, imitate, lookalikes, slot_rows
from .tokenizer import FIRST_WORD_TOKEN, kept_sentences, read_sentences

# So small a denoiser is sure of little, and what it draws at the real one's temperatures is mostly wrong (80 monitor
# sentences, 8 steps from the draft: WER 51 % so, 62 % at 0.8 to 0.4 with a bound of 0.1).
NEARLY_GREEDY = DenoiseOptions(steps=8, entropy_bound=10.0, t_max=0.2, t_min=0.1)
NOISE_ALONE = 9.0  # a level of gaussian noise at which nothing of a token is left
MARGIN = 8  # canvases are up to this many tokens longer than the longest transcript


@dataclass(frozen=True)
class Curriculum:
    """From clean slots and random tokens to noisy slots and real sentences."""

    clean: int  # steps of clean slots and random tokens
    until: int  # step from which on all is noisy and real

    def __post_init__(self) -> None:
        require(0 <= self.clean < self.until, "curriculum.clean", self.clean, "at least 0 and below curriculum.until")

    def level(self, step: int) -> float:
        """0 for the first `clean` steps, then linearly up to 1 at step `until`: noise of the slots, share of real
        sentences."""
        return min(1.0, max(0.0, (step - self.clean) / (self.until - self.clean)))


@dataclass(frozen=True, kw_only=True)
class BackboneTrain(LoopOptions):
    """The loop's options, and what batches hold."""

    batch_size: int  # sentences in a batch, at most
    batch_tokens: int  # and transcript tokens, padding included
    noise_only: float = 0.0  # share of the batches whose prompts hold one slot each, of noise: language without sound
    unnamed: float = 0.0  # share of the prompts that do not name the language
    unroll_from: int = 0  # step from which losses.unroll counts


@dataclass(frozen=True)
class TextData:
    """Sentences to train on and to judge by."""

    text: tuple[Path, ...]  # files CODE.txt with a sentence of that language a line, and manifests
    dev: dict[str, Path]  # such a file of each language
    dev_count: int  # sentences of each that are read to judge the run
    max_tokens: int  # of a transcript; longer sentences are left out
    exclude: tuple[Path, ...] = ()  # such files, whose sentences are left out
    temperature: float = 1.0  # T: a language's share is its sentences ** (1 / T)
    joined: float = 0.0  # share of the sentences that go on with those behind them


@dataclass(frozen=True)
class BackboneRecipe:
    """The stage `backbone`."""

    stage: Literal["backbone"]
    name: str  # of the run's folder
    tokenizer: Path  # folder
    shape: BackboneShape
    curriculum: Curriculum
    train: BackboneTrain
    data: TextData
    slots: SlotNoise = field(default_factory=SlotNoise)
    losses: LossRecipe = field(default_factory=LossRecipe)
    start_from: Path | None = None  # folder of a backbone of the same shape, with any tokenizer; see `warm_start`

    def __post_init__(self) -> None:
        require(self.losses.ctc == 0, "losses.ctc", self.losses.ctc, "0: there is no sound in this stage")
        require(self.losses.uses_backbone, "losses", "weights of 0", "positive for diffusion or autoregressive")


class Reader:
    """Makes prompts with imitated audio tokens out of sentences.

    Args:
        backbone: whose embeddings are imitated.
        prompts: of its tokenizer.
        noise: largest levels.
    """

    def __init__(self, backbone: Backbone, prompts: PromptBuilder, noise: SlotNoise):
        self.backbone, self.prompts, self.noise = backbone, prompts, noise
        tokenizer = prompts.tokenizer
        self.similar = lookalikes(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), FIRST_WORD_TOKEN)

    def batch(
        self,
        targets: list[list[int]],
        languages: Sequence[str],
        rng: random.Random,
        margin: int,
        noise_only: float = 0.0,
        level: float = 1.0,
        unnamed: float = 0.0,
    ) -> tuple[Tensor, TextBatch, EditCanvases]:
        """Sentences as the backbone is to read them.

        Args:
            targets: of each row, as `PromptBuilder.target` gives them.
            languages: of each row.
            rng: of all draws but those of torch.
            margin: canvas positions beyond the longest target.
            noise_only: share of the batches whose rows have one slot each, of noise: their prompts are short, and cost half.
            level: factor on the noise of the slots.
            unnamed: share of the rows whose prompt does not name the language; see `text_batch`.

        Returns:
            embeddings (B, P, H) with filled slots, their batch, and canvases that hold what the slots spell; all on the
            backbone's device.
        """
        special, device = self.prompts.special, self.backbone.device
        noise = SlotNoise(**{name: level * value for name, value in asdict(self.noise).items()})
        if rng.random() < noise_only:
            rows = [([special["pad"]], [special["pad"]], 0.0, NOISE_ALONE) for _ in targets]
        else:
            rows = [imitate(target[:-1], self.similar, special["pad"], noise, rng) for target in targets]
        hidden = [rng.random() < unnamed for _ in rows]
        batch = text_batch(self.prompts, [len(row[0]) for row in rows], targets, languages, margin, hidden).to(device)
        embeds = self.backbone.embed(batch.ids)
        shown, mixed = (
            self.backbone.embed(torch.tensor([token for row in tokens for token in row], device=device))
            for tokens in ([row[0] for row in rows], [row[1] for row in rows])
        )
        counts = torch.tensor([len(row[0]) for row in rows])
        blur = torch.tensor([row[2] for row in rows])
        gaussian = torch.tensor([row[3] for row in rows])
        blur, gaussian = (values.repeat_interleave(counts)[:, None].to(device) for values in (blur, gaussian))  # (slots, 1)
        slots = slot_rows(shown, mixed, blur, gaussian, self.backbone.embedding_scale())
        spelled = [collapsed(row[0], special["pad"]) for row in rows]
        clean, ending = [target[:-1] for target in targets], (special["end_of_turn"], special["eos"])
        drafts = edit_canvases(spelled, clean, ending, special["pad"], batch.canvas.shape[1])
        filled = embeds.masked_scatter(batch.slot_mask[..., None], slots)
        return filled, batch, EditCanvases(*(part.to(device) for part in drafts))


def new_backbone(config: DiffusionGemmaConfig) -> Backbone:
    """A backbone with random weights that is ready to learn."""
    backbone = Backbone.from_config(config)
    # Token 0 stands for "no token" in the slots; the library's zero row would have no direction.
    torch.nn.init.normal_(backbone.lm_head_weight.data[config.text_config.pad_token_id], std=backbone.hidden_size**-0.5)
    for name, parameter in backbone.named_parameters():
        # Queries and keys are normalised and not divided by sqrt(head_dim): at 1 these gains would start attention
        # one-hot.
        if name.endswith(("q_norm.weight", "k_norm.weight")) and "vision" not in name:
            torch.nn.init.constant_(parameter, parameter.numel() ** -0.25)
    return backbone


@torch.no_grad()
def warm_start(backbone: Backbone, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> int:
    """Takes the weights of a backbone of the same shape that may have another tokenizer.

    Tokens that both spell alike keep their rows; the others start in a random direction, as long as the old ones are.

    Args:
        backbone: gets the weights.
        tokenizer: its own.
        folder: of the old backbone and its tokenizer.

    Returns:
        how many tokens kept their rows.

    Raises:
        CheckpointError: the folder holds no backbone, or one of another shape.
    """
    source = BackboneConfig(str(folder))
    old = dict(load_backbone(source).named_parameters())
    old_ids = load_tokenizer(source).get_vocab()
    rows = next(name for name in old if name.endswith("embed_tokens.weight"))
    parameters = dict(backbone.named_parameters())
    load_weights({n: p for n, p in parameters.items() if n != rows}, {n: p for n, p in old.items() if n != rows}, folder)
    shared = [(new, old_ids[token]) for token, new in tokenizer.get_vocab().items() if token in old_ids]
    length = old[rows].norm(dim=1).mean()
    fresh = torch.nn.functional.normalize(torch.randn_like(parameters[rows]), dim=1) * length
    here, there = (torch.tensor(ids) for ids in zip(*shared, strict=True))
    fresh[here] = old[rows][there]
    parameters[rows].copy_(fresh)
    return len(shared)


def scrambled(target: list[int], vocabulary: int, rng: random.Random) -> list[int]:
    """A target of as many random word tokens, with the same end."""
    return [*(rng.randrange(FIRST_WORD_TOKEN, vocabulary) for _ in target[:-1]), target[-1]]


def joined(targets: Sequence[list[int]], share: float, most: int, rng: random.Random) -> list[list[int]]:
    """Targets, of which a share goes on with those that follow it, up to a length drawn for each: people speak for longer
    than a sentence."""
    rows = []
    for first, target in enumerate(targets):
        wanted, row = (rng.randint(1, most) if rng.random() < share else 0), target
        for following in targets[first + 1 : first + 20]:
            if len(row) >= wanted or len(row) + len(following) - 1 > most:
                break
            row = [*row[:-1], *following]
        rows.append(row)
    return rows


def train_backbone(recipe: BackboneRecipe, folder: Path, device: torch.device) -> Path:
    """Trains a backbone, resuming what a killed run left.

    Args:
        recipe: of the stage.
        folder: of the run; gets log.jsonl, state.pt and backbone/, in the real layout.
        device: where to compute.

    Returns:
        the backbone's folder.

    Raises:
        AsrError: tokenizer, text, `start_from` or a saved state cannot be used.
    """
    trainer = TextTrainer(recipe, device)
    backbone = trainer.reader.backbone
    trained = {name: p for name, p in backbone.named_parameters() if "vision" not in name}
    run(trained, trainer.loss_of, folder, recipe.train, trainer.evaluate, trainer.settings)
    if rank() == 0:
        save_backbone(backbone, trainer.reader.prompts, folder / "backbone")
    return folder / "backbone"


class TextTrainer:
    """The sentences of a recipe and what the loop asks of them: the loss of a step, and a judgement now and then."""

    def __init__(self, recipe: BackboneRecipe, device: torch.device):
        self.recipe, self.console = recipe, Console(stderr=True, quiet=rank() > 0)
        tokenizer = load_tokenizer(BackboneConfig(str(recipe.tokenizer)))
        prompts, data, train = PromptBuilder(tokenizer), recipe.data, recipe.train
        self.dtype = compute_dtype(train.dtype, device)
        self.dev = {code: read_sentences([path])[code][: data.dev_count] for code, path in data.dev.items()}
        self.targets: list[list[int]] = []
        self.languages: list[str] = []
        sizes = []
        for code, lines in kept_sentences(data.text, data.exclude).items():
            spelled = [prompts.target(line) for line in lines]
            fitting = [target for target in spelled if len(target) <= data.max_tokens]
            self.targets += joined(fitting, data.joined, data.max_tokens, random.Random(train.seed))
            self.languages += [code] * len(fitting)
            sizes.append(len(fitting))
        torch.manual_seed(train.seed)
        backbone = new_backbone(small_config(tokenizer, recipe.shape))
        if recipe.start_from is not None:
            kept = warm_start(backbone, tokenizer, recipe.start_from)
            self.console.print(f"{kept} of {len(tokenizer)} tokens are those of {recipe.start_from}")
        self.settings = fingerprint.of_recipe(recipe) | {
            "data": fingerprint.of_lines(map(str, self.targets)),
            "start_from": "nothing" if recipe.start_from is None else fingerprint.of_tensors(backbone.state_dict()),
        }
        self.reader = Reader(backbone.to(device), prompts, recipe.slots)
        lengths = [len(target) for target in self.targets]
        shares = tempered(sizes, data.temperature)
        self.mixture = Mixture(sizes, shares, lengths, train.batch_tokens, train.batch_size, train.seed)

    def loss_of(self, step: int, micro: int) -> tuple[Tensor, Metrics]:
        """The weighted loss of one micro-batch, and its parts."""
        train, backbone = self.recipe.train, self.reader.backbone
        backbone.train()
        rng = random.Random(step_seed(train.seed, step, micro))
        level = self.recipe.curriculum.level(step)
        chosen = self.mixture.at(step * train.accumulation + micro)
        rows = [self.targets[i] for i in chosen]
        rows = [scrambled(row, backbone.vocab_size, rng) if rng.random() < 1 - level else row for row in rows]
        languages, margin = [self.languages[i] for i in chosen], rng.randint(0, MARGIN)
        embeds, batch, drafts = self.reader.batch(rows, languages, rng, margin, train.noise_only, level, train.unnamed)
        weights = self.recipe.losses if step >= train.unroll_from else replace(self.recipe.losses, unroll=0.0)
        with torch.autocast(backbone.device.type, self.dtype, enabled=self.dtype != torch.float32):
            losses = backbone_losses(backbone, embeds, batch, weights, drafts)
        return losses.total(weights), losses.figures()

    @torch.no_grad()
    def evaluate(self, step: int) -> Metrics:
        """Error rates of sentences read from imitated slots, in each language."""
        self.reader.backbone.eval()
        figures: Metrics = {}
        for code, sentences in self.dev.items():
            texts = read_back(self.reader, sentences, code)
            for line in list(zip(sentences, *texts.values(), strict=True))[:2]:
                self.console.print(f"step {step} {code} | " + " | ".join(line), style="dim", markup=False)
            figures |= {f"errors_{name}_{code}": round(error_rate(sentences, t, code), 4) for name, t in texts.items()}
        self.console.print(str(figures), markup=False)
        return figures


@torch.no_grad()
def read_back(reader: Reader, sentences: list[str], language: str) -> dict[str, list[str]]:
    """Sentences read from imitated slots.

    Returns:
        of_slots: what the slots show; 8_steps, 8_steps_from_slots: 8 denoising steps from noise, and from what they show.
    """
    backbone, prompts = reader.backbone, reader.prompts
    torch.manual_seed(1)

    def text(tokens: Sequence[int]) -> str:
        return prompts.tokenizer.decode(tokens, skip_special_tokens=True)

    texts: dict[str, list[str]] = {"of_slots": [], "8_steps": [], "8_steps_from_slots": []}
    for i, sentence in enumerate(sentences):  # one by one: each row with the seed of its slots
        target = prompts.target(sentence)
        shown = imitate(target[:-1], reader.similar, prompts.special["pad"], reader.noise, random.Random(i))[0]
        texts["of_slots"].append(text(collapsed(shown, prompts.special["pad"])))
        embeds, batch, (spelled, _, _) = reader.batch([target], [language], random.Random(i), margin=4)
        prompt = int(batch.lengths[0])
        prefill, _ = backbone.prefill(embeds[:, :prompt], batch.mask[:, :prompt])
        generator = torch.Generator(backbone.device).manual_seed(i)
        noise = uniform_canvas(1, batch.canvas.shape[1], backbone.vocab_size, generator, backbone.device)
        for name, canvas in (("8_steps", noise), ("8_steps_from_slots", spelled)):
            result = denoise(backbone, prefill, canvas, NEARLY_GREEDY, generator)
            texts[name].append(text(cut_at_end(result.canvas, prompts.end_ids)[0]))
    return texts


def save_backbone(backbone: Backbone, prompts: PromptBuilder, folder: Path) -> None:
    """Writes weights (float16), tokenizer and generation settings as google/diffusiongemma-26B-A4B-it lays them out."""
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
