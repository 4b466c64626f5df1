"""The stage `backbone`: pretrains a small DiffusionGemma on text, with imitated audio tokens.

The prompt has a sentence as imitated audio tokens (slots.py); the clean sentence is the target, on the canvas and, for the
autoregressive loss, behind the prompt. A share of the batches has noise in place of the audio tokens, to train a language
model. Languages are sampled by a temperature, and some prompts do not name the language. A curriculum starts with clean
audio tokens of random tokens, which cannot be guessed from context, and moves to noisy ones of real sentences.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaGenerationConfig, PreTrainedTokenizerBase

from ...checkpoint.parts import load_backbone, load_tokenizer
from ...denoise.canvas import EditCanvases, edit_canvases, uniform_canvas
from ...denoise.steps import DenoiseOptions, cut_at_end, denoise
from ...errors import CheckpointError, first_line
from ...evaluate.metrics import error_rate
from ...model.backbone import Backbone
from ...model.config import BackboneConfig
from ...model.packing import unpack
from ...model.prompt import PromptBuilder
from ...strict import require
from .. import fingerprint
from ..compiled import compile_layers
from ..loop import LoopOptions, Metrics, compute_dtype, load_weights, run, step_seed
from ..objective import TextBatch, backbone_losses, text_batch
from ..recipe import LossRecipe
from ..workers import rank
from .backbone_config import BackboneShape, small_config
from .decoder_backbone import begin_as_decoder
from .sentences import TextData, random_rows, read_targets
from .slots import SlotNoise, collapsed, imitate, lookalikes, slot_rows
from .tokenizer import FIRST_WORD_TOKEN, read_sentences

# A small denoiser has high entropy, so samples at DiffusionGemma's temperatures are mostly wrong: 8 steps from the draft of
# 80 dev sentences give 51 % WER with these options, 62 % with t_max 0.8, t_min 0.4 and a bound of 0.1.
NEARLY_GREEDY = DenoiseOptions(steps=8, entropy_bound=10.0, t_max=0.2, t_min=0.1)
NOISE_ALONE = 9.0  # a level of gaussian noise that hides the token
DRAWN = 5000  # sentences, of which a decoder's maps are fitted to those that it can write
MARGIN = 8  # canvases are up to this many tokens longer than the longest transcript


@dataclass(frozen=True)
class Curriculum:
    """From clean slots and random tokens to noisy slots and real sentences, in prompts that have slots to read."""

    clean: int  # first steps, with clean slots and random tokens alone
    until: int  # step from which slots have full noise, and all sentences are real
    length: int = 16  # random tokens in a row at most: what to read is found soonest where there is little

    def __post_init__(self) -> None:
        require(0 <= self.clean < self.until, "curriculum.clean", self.clean, "at least 0 and below curriculum.until")
        require(self.length >= 1, "curriculum.length", self.length, "at least 1")

    def level(self, step: int) -> float:
        """Factor on the noise of slots, and share of real sentences: 0 up to `clean`, then linear to 1 at `until`."""
        return min(1.0, max(0.0, (step - self.clean) / (self.until - self.clean)))


@dataclass(frozen=True, kw_only=True)
class BackboneTrain(LoopOptions):
    """The loop's options, and the content of batches."""

    batch_size: int  # sentences in a batch at most
    batch_tokens: int  # transcript tokens in a batch at most, padding included
    noise_only: float = 0.0  # share of batches whose prompts have a single slot of noise, to train a language model
    unnamed: float = 0.0  # share of prompts that do not name the language
    unroll_from: int = 0  # first step with losses.unroll
    compile: bool = False  # compile the layers, see train/compiled.py


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
    rows: Path | None = None  # rows.safetensors of the tokenizer's stage: the tokens' rows, which then do not learn
    decoder: str | None = (
        None  # a whole Whisper (hub name or folder): the layers begin as its decoder's, and its rows are there
    )

    def __post_init__(self) -> None:
        require(self.losses.ctc == 0, "losses.ctc", self.losses.ctc, "0: there is no sound in this stage")
        if self.decoder is not None:
            require(self.start_from is None, "start_from", self.start_from, "left out: the backbone begins as 'decoder'")
            require(self.rows is not None, "rows", self.rows, "those of the Whisper that 'decoder' names")
        require(self.losses.uses_backbone, "losses", "weights of 0", "positive for diffusion or autoregressive")


class Reader:
    """Builds batches of prompts with imitated audio tokens.

    Args:
        backbone: its token embeddings are imitated.
        prompts: of its tokenizer.
        noise: upper limits of the levels.
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
        noise_only: bool = False,
        level: float = 1.0,
        unnamed: float = 0.0,
    ) -> tuple[Tensor, TextBatch, EditCanvases]:
        """Builds a batch.

        Args:
            targets: transcript and end of turn of each row, see `PromptBuilder.target`.
            languages: code of each row.
            rng: of all draws but torch's.
            margin: canvas positions beyond the longest target.
            noise_only: whether all rows have a single slot of noise; such a batch takes half the time.
            level: factor on the noise of the slots.
            unnamed: share of rows whose prompt does not name the language; see `text_batch`.

        Returns:
            embeddings (B, P, H) with filled slots, the batch, and canvases with the collapsed slots as drafts; all on the
            backbone's device.
        """
        special, device = self.prompts.special, self.backbone.device
        noise = SlotNoise(**{name: level * value for name, value in asdict(self.noise).items()})
        if noise_only:
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
    """A backbone with random weights, initialised for training."""
    backbone = Backbone.from_config(config)
    # The pad token is the blank of the slots; the library initialises its embedding to zero, which has no direction.
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
    try:
        rows = unpack(load_file(path))["rows"]
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path}: no rows of tokens there ({first_line(error)}); run the stage 'tokenizer'") from None
    weight = backbone.lm_head_weight
    if rows.shape != weight.shape:
        raise CheckpointError(f"{path}: {tuple(rows.shape)} rows and columns, where the recipe has {tuple(weight.shape)}")
    weight.data.copy_(rows)
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
    trainer = TextTrainer(recipe, device)
    backbone = trainer.reader.backbone
    trained = {name: p for name, p in backbone.named_parameters() if "vision" not in name and p.requires_grad}
    run(trained, trainer.loss_of, folder, recipe.train, trainer.evaluate, trainer.settings)
    if rank() == 0:
        save_backbone(backbone, trainer.reader.prompts, folder / "backbone")
    return folder / "backbone"


class TextTrainer:
    """The callbacks of the training loop for a backbone: the loss of a step, and evaluation.

    Args:
        recipe: of the stage.
        device: to compute on.

    Attributes:
        reader: the backbone, and its batches.
        settings: fingerprints of everything that the run depends on, by name.
    """

    def __init__(self, recipe: BackboneRecipe, device: torch.device):
        self.recipe, self.console = recipe, Console(stderr=True, quiet=rank() > 0)
        tokenizer = load_tokenizer(BackboneConfig(str(recipe.tokenizer)))
        prompts, data, train = PromptBuilder(tokenizer), recipe.data, recipe.train
        self.dtype = compute_dtype(train.dtype, device)
        self.dev = {code: read_sentences([path])[code][: data.dev_count] for code, path in data.dev.items()}
        self.sentences = read_targets(data, prompts, train.seed)
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
        if recipe.decoder is not None:
            every = [*zip(self.sentences.targets, self.sentences.languages, strict=True)]
            drawn = random.Random(train.seed).sample(every, min(DRAWN, len(every)))
            kept = begin_as_decoder(backbone, prompts, recipe.decoder, drawn)
            self.console.print(f"{recipe.decoder}: {100 * kept:.0f} % of what its decoder's last states vary by is kept")
        if train.compile:
            compile_layers(backbone)
        self.reader = Reader(backbone.to(device), prompts, recipe.slots)
        self.ordinary = range(FIRST_WORD_TOKEN, backbone.vocab_size)  # tokens
        self.mixture = self.sentences.mixture(data, train.batch_tokens, train.batch_size, train.seed)

    def loss_of(self, step: int, micro: int) -> tuple[Tensor, Metrics]:
        """The weighted loss of one micro-batch, and its parts."""
        train, backbone = self.recipe.train, self.reader.backbone
        backbone.train()
        rng = random.Random(step_seed(train.seed, step, micro))
        level = self.recipe.curriculum.level(step)
        chosen = self.mixture.at(step * train.accumulation + micro)
        rows = [self.sentences.targets[i] for i in chosen]
        languages, margin = [self.sentences.languages[i] for i in chosen], rng.randint(0, MARGIN)
        read = rng.random() >= train.noise_only
        if read and rng.random() >= level:
            length, end = self.recipe.curriculum.length, self.reader.prompts.special["end_of_turn"]
            rows = random_rows(train.batch_tokens // (2 * length), length, self.ordinary, end, rng)
            languages = rng.choices(languages, k=len(rows))
        embeds, batch, drafts = self.reader.batch(rows, languages, rng, margin, not read, level, train.unnamed)
        weights = self.recipe.losses if step >= train.unroll_from else replace(self.recipe.losses, unroll=0.0)
        with torch.autocast(backbone.device.type, self.dtype, enabled=self.dtype != torch.float32):
            losses = backbone_losses(backbone, embeds, batch, weights, drafts)
        kind = "" if read else "_without_sound"
        return losses.total(weights), {f"{name}{kind}": value for name, value in losses.figures().items()}

    @torch.no_grad()
    def evaluate(self, step: int) -> Metrics:
        """Error rates on imitated audio tokens of the dev sentences, in each language."""
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
    """Transcribes imitated audio tokens of sentences.

    Args:
        reader: the backbone, and its batches.
        sentences: plain text.
        language: code of all sentences.

    Returns:
        a text for each sentence, by method; of_slots: collapsed slots; 8_steps: 8 denoising steps from noise;
        8_steps_from_slots: 8 denoising steps from the collapsed slots.
    """
    backbone, prompts = reader.backbone, reader.prompts
    torch.manual_seed(1)

    def text(tokens: Sequence[int]) -> str:
        return prompts.tokenizer.decode(tokens, skip_special_tokens=True)

    texts: dict[str, list[str]] = {"of_slots": [], "8_steps": [], "8_steps_from_slots": []}
    for i, sentence in enumerate(sentences):  # not batched, since each has a seed
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
