"""Stage 1 of the mini model: a small DiffusionGemma, trained from nothing on text, then frozen.

It learns to read: every prompt holds a sentence as imitated audio tokens (see data/slots.py), the clean sentence is the
transcript on the canvas and, for the autoregressive loss, behind the prompt. A share of the prompts holds no sentence
at all, which keeps the backbone a language model. Languages are mixed by a temperature, and some prompts do not name
theirs. Training begins with clean slots and many sentences of random tokens, where nothing but reading helps; once it can
read, the slots grow noisy and real sentences take over.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer, DiffusionGemmaConfig, DiffusionGemmaGenerationConfig, PreTrainedTokenizerBase

from ..backbone import Backbone
from ..data.batches import Mixture, tempered
from ..data.slots import SlotNoise, collapsed, imitate, lookalikes, slot_rows
from ..denoise import DenoiseOptions, cut_at_end, denoise
from ..edits import EditCanvases, edit_canvases
from ..noise import uniform_canvas
from ..objective import TextBatch, backbone_losses, text_batch
from ..prompt import PromptBuilder
from .backbone_config import small_config
from .loop import LoopOptions, Metrics, load_weights, run, step_seed
from .monitor import error_rate
from .tokenizer import FIRST_WORD_TOKEN, kept_sentences, read_sentences
from .workers import join_workers, rank

# So small a denoiser is sure of little, and what it draws at the real one's temperatures is mostly wrong (80 monitor
# sentences, 8 steps from the draft: WER 51 % so, 62 % at 0.8 to 0.4 with a bound of 0.1).
NEARLY_GREEDY = DenoiseOptions(steps=8, entropy_bound=10.0, t_max=0.2, t_min=0.1)


class Reader:
    """Makes prompts with imitated audio tokens out of sentences."""

    def __init__(self, backbone: Backbone, prompts: PromptBuilder, noise: SlotNoise):
        self.backbone, self.prompts, self.noise = backbone, prompts, noise
        tokenizer = prompts.tokenizer
        self.similar = lookalikes(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), FIRST_WORD_TOKEN)

    def batch(
        self, targets: list[list[int]], languages: Sequence[str], rng: random.Random, margin: int, unheard: float,
        level: float = 1.0, unnamed: float = 0.0,
    ) -> tuple[Tensor, TextBatch, EditCanvases]:  # fmt: skip
        """Embeddings (B, P, H) with filled slots, their batch, and canvases that hold what the slots spell.

        Args:
            languages: of each row.
            margin: canvas positions beyond the longest target.
            unheard: share of the rows whose slots hold noise only.
            level: factor on the noise of the slots.
            unnamed: share of the rows whose prompt does not name the language; see `text_batch`.
        """
        special = self.prompts.special
        noise = SlotNoise(**{name: level * value for name, value in asdict(self.noise).items()})
        rows = [imitate(target[:-1], self.similar, special["pad"], noise, rng) for target in targets]
        hidden = [rng.random() < unnamed for _ in rows]
        batch = text_batch(self.prompts, [len(row[0]) for row in rows], targets, languages, margin, hidden)
        embeds = self.backbone.embed(batch.ids)
        shown = self.backbone.embed(torch.tensor([i for row in rows for i in row[0]]))
        mixed = self.backbone.embed(torch.tensor([i for row in rows for i in row[1]]))
        blur = torch.tensor([row[2] for row in rows])
        gaussian = torch.tensor([9.0 if rng.random() < unheard else row[3] for row in rows])  # at 9 no token is left
        counts = torch.tensor([len(row[0]) for row in rows])
        blur, gaussian = (values.repeat_interleave(counts)[:, None] for values in (blur, gaussian))  # (slots, 1) each
        slots = slot_rows(shown, mixed, blur, gaussian, self.backbone.embedding_scale())
        spelled = [collapsed(row[0], special["pad"]) for row in rows]
        clean = [target[:-1] for target in targets]
        ending = special["end_of_turn"], special["eos"]
        leads = [row[:n] for row, n in zip(batch.canvas.tolist(), batch.leads.tolist(), strict=True)]
        drafts = edit_canvases(spelled, clean, ending, special["pad"], batch.canvas.shape[1], leads)
        return embeds.masked_scatter(batch.slot_mask[..., None], slots), batch, drafts


def new_backbone(config: DiffusionGemmaConfig) -> Backbone:
    """A backbone with random weights that is ready to learn."""
    backbone = Backbone.from_config(config)
    # Token 0 stands for "nothing heard" in the slots; the library's zero row would have no direction.
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
        tokenizer: the new backbone's.
        folder: of the old backbone and its tokenizer.

    Returns:
        how many tokens kept their rows.

    Raises:
        CheckpointError: the folder holds no backbone, or one of another shape.
    """
    old = dict(Backbone.from_pretrained(folder).named_parameters())
    old_ids = AutoTokenizer.from_pretrained(folder).get_vocab()
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


def curriculum_level(step: int, clean: int, until: int) -> float:
    """0 for the first `clean` steps, then linearly up to 1 at step `until`: noise of the slots, share of real
    sentences."""
    return min(1.0, max(0.0, (step - clean) / (until - clean)))


def scrambled(target: list[int], vocabulary: int, rng: random.Random) -> list[int]:
    """A target of as many random word tokens, with the same end."""
    return [*(rng.randrange(FIRST_WORD_TOKEN, vocabulary) for _ in target[:-1]), target[-1]]


def train_text(recipe: dict, folder: Path, start_from: str | Path | None = None) -> None:
    """Trains by a stage recipe, from nothing or from the backbone in `start_from` (see `warm_start`), and writes the
    backbone, in the real layout, to `folder/backbone`."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    prompts = PromptBuilder(tokenizer)
    data, seed = recipe["data"], recipe["loop"]["seed"]
    dev = {code: read_sentences([path])[code][: data["dev_count"]] for code, path in data["dev"].items()}
    targets, languages, sizes = [], [], []
    for code, lines in kept_sentences(data["text"], data["exclude"]).items():
        spelled = [prompts.target(line) for line in lines]
        fitting = [target for target in spelled if len(target) <= data["max_tokens"]]
        targets += fitting
        languages += [code] * len(fitting)
        sizes.append(len(fitting))
    torch.manual_seed(seed)
    backbone = new_backbone(small_config(tokenizer, **recipe["model"]))
    if start_from is not None:
        print(f"{warm_start(backbone, tokenizer, start_from)} of {len(tokenizer)} tokens are those of {start_from}")
    reader = Reader(backbone, prompts, SlotNoise(**recipe["slots"]))
    mixture = Mixture(
        sizes, tempered(sizes, data["temperature"]), [len(target) for target in targets], recipe["batch_tokens"],
        recipe["batch_size"], seed,
    )  # fmt: skip
    trained = {name: p for name, p in backbone.named_parameters() if "vision" not in name}
    options = LoopOptions(**recipe["loop"])

    def loss_of(step: int, micro: int) -> tuple[Tensor, Metrics]:
        backbone.train()
        rng = random.Random(step_seed(seed, step, micro))
        grown = curriculum_level(step, **recipe["curriculum"])
        chosen = mixture.at(step * options.accumulation + micro)
        rows = [targets[i] for i in chosen]
        rows = [scrambled(row, len(tokenizer), rng) if rng.random() < 1 - grown else row for row in rows]
        spoken = [languages[i] for i in chosen]
        margin = rng.randint(0, 8)
        embeds, batch, drafts = reader.batch(rows, spoken, rng, margin, recipe["unheard"], grown, recipe["unnamed"])
        losses = backbone_losses(
            backbone, embeds, batch, recipe["self_conditioning"], recipe["full_noise"], drafts=drafts,
            draft_share=recipe["draft_share"], unroll=float(step >= recipe["unroll_from"]),
        )  # fmt: skip
        metrics = {name: float(value.detach()) for name, value in losses.__dict__.items()}
        return losses.diffusion + recipe["autoregressive"] * losses.autoregressive, metrics

    def evaluate(step: int) -> Metrics:
        backbone.eval()
        figures: Metrics = {}
        for code, sentences in dev.items():
            figures |= {f"{name}_{code}": value for name, value in _read_back(reader, sentences, code, step).items()}
        print(figures, flush=True)
        return figures

    start = time.time()
    run(trained, loss_of, folder / "backbone-run", options, evaluate)
    if rank() > 0:
        return
    save_backbone(backbone, prompts, folder / "backbone")
    counts = dict(Counter(languages))
    print(json.dumps({"stage": "text", "sentences": counts, "minutes": (time.time() - start) / 60}))


@torch.no_grad()
def _read_back(reader: Reader, sentences: list[str], language: str, step: int) -> Metrics:
    """Error rates of sentences read from imitated slots: what the slots show, and 8 denoising steps from noise and from
    what they show."""
    backbone, prompts = reader.backbone, reader.prompts
    torch.manual_seed(1)
    targets = [prompts.target(s) for s in sentences]
    shown = [imitate(t[:-1], reader.similar, 0, reader.noise, random.Random(i))[0] for i, t in enumerate(targets)]
    drafts = [collapsed(row, prompts.special["pad"]) for row in shown]
    texts: dict[str, list[str]] = {"8_steps": [], "8_steps_from_slots": []}
    for i, target in enumerate(targets):  # one by one: each row with the seed of its slots
        embeds, batch, (spelled, _, _) = reader.batch([target], [language], random.Random(i), 4, 0.0)
        mask = batch.mask & ~batch.target_mask
        prefill, _ = backbone.prefill(embeds[:, : int(mask.sum())], mask[:, : int(mask.sum())])
        generator = torch.Generator().manual_seed(i)
        canvas = uniform_canvas(1, batch.canvas.shape[1], backbone.vocab_size, generator)
        for found, first in zip(texts.values(), (canvas, spelled), strict=True):
            result = denoise(backbone, prefill, first, NEARLY_GREEDY, generator)
            found.append(prompts.tokenizer.decode(cut_at_end(result.canvas, prompts.end_ids)[0], skip_special_tokens=True))
    drafted = [prompts.tokenizer.decode(d, skip_special_tokens=True) for d in drafts]
    for line in list(zip(sentences, drafted, *texts.values(), strict=True))[:2]:
        print(f"step {step} {language} | " + " | ".join(line), flush=True)
    read = {"of_slots": drafted} | texts
    return {f"errors_{name}": round(error_rate(sentences, lines, language), 4) for name, lines in read.items()}


def save_backbone(backbone: Backbone, prompts: PromptBuilder, folder: Path) -> None:
    """Writes weights (float16), tokenizer and generation settings as google/diffusiongemma-26B-A4B-it lays them out."""
    model = backbone.model
    model.generation_config = DiffusionGemmaGenerationConfig(
        max_new_tokens=64, max_denoising_steps=48, t_min=NEARLY_GREEDY.t_min, t_max=NEARLY_GREEDY.t_max,
        stability_threshold=NEARLY_GREEDY.stability_threshold, confidence_threshold=NEARLY_GREEDY.confidence_threshold,
        sampler_config={"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": NEARLY_GREEDY.entropy_bound},
        bos_token_id=prompts.special["bos"], pad_token_id=prompts.special["pad"],
        eos_token_id=[prompts.special["eos"], prompts.special["end_of_turn"]],
    )  # fmt: skip
    model.half().save_pretrained(folder)
    model.float()
    prompts.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the mini model's backbone on text (stage 1).")
    parser.add_argument("recipe", help="stage recipe, YAML")
    parser.add_argument("folder", help="run folder that holds tokenizer/")
    parser.add_argument("--start_from", help="folder of a backbone of the same shape, with any tokenizer, to go on with")
    args = parser.parse_args()
    join_workers()
    train_text(yaml.safe_load(Path(args.recipe).read_text(encoding="utf-8")), Path(args.folder), args.start_from)
