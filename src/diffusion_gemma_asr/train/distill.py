"""An encoder of our own that learns from a larger Whisper's: the ears of the six-language mini model.

The student is a small Whisper encoder. It learns up to three things at once: its frames,
through a linear map, are to be the teacher's frames of the same sound, which lie in a cache on disk (Hinton et al. 2015;
only the last layer is imitated); the phoneme of every frame of synthetic speech, which espeak-ng knows; and, once a
projector has learnt to read the teacher, what it spells out of the imitated frames, by CTC over the tokenizer's tokens.
The student's spectrogram is masked and warped, the teacher heard it as it is.

The map to the teacher's width is linear and without a bias, as is what the projector's first convolution does with a frame:
at the end the one is folded into the other, and the student is an encoder like any other, with a projector of its own. From
there it can go on without the teacher (a recipe without `teacher_frames`), whose frames then need not be made for new sound,
and the sound's tempo may be changed too.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..backbone import Backbone
from ..checkpoint import read_projector, save_projector
from ..ctc import lm_head_ctc_loss, lm_head_draft
from ..data.augment import Masking, change_tempo, log_uniform, mask_bands, warp_frequencies
from ..data.batches import Mixture, tempered
from ..data.features import FeatureCache
from ..data.manifest import Utterance, read_manifest
from ..data.synth import read_sound
from ..data.text import plain_text
from ..encoder import AcousticEncoder, length_mask
from ..projector import AudioProjector, new_projector
from ..recipe import ProjectorRecipe, from_mapping
from .adapter import compute_dtype, computing_in, first_of
from .loop import LoopOptions, Metrics, load_weights, run
from .monitor import error_rate
from .whisper import PhonemeTimes, save_encoder, whisper_config
from .workers import join_workers, rank

HEADS = "heads.safetensors"  # what maps frames to the teacher's and to phonemes


class Student(nn.Module):
    """An encoder with a linear map to its teacher's frames and a phoneme head.

    Args:
        acoustic: the encoder.
        phonemes: classes of the phoneme head.
        deviations: (teacher width,) standard deviation of each component of the teacher's frames: an error counts in these.
            None where there is no teacher.
    """

    deviations: Tensor | None

    def __init__(self, acoustic: AcousticEncoder, phonemes: int, deviations: Tensor | None = None):
        super().__init__()
        self.acoustic = acoustic
        self.phoneme_head = nn.Linear(acoustic.hidden_size, phonemes)
        self.teacher_head = nn.Linear(acoustic.hidden_size, len(deviations), bias=False) if deviations is not None else None
        self.register_buffer("deviations", deviations)

    def imitated(self, frames: Tensor) -> Tensor:
        """Frames (B, F, width) as the projector takes them: like the teacher's (B, F, teacher width), if there is one."""
        return frames if self.teacher_head is None else self.teacher_head(frames)

    def teacher_loss(self, imitated: Tensor, wanted: Tensor, lengths: Tensor) -> Tensor:
        """Mean squared error a component in squared deviations: 1 is what a constant guess costs.

        Args:
            imitated, wanted: (B, F, teacher width); lengths: (B,) frames in use.
        """
        assert self.deviations is not None
        inside = length_mask(lengths, wanted.shape[1])  # (B, F)
        return ((imitated.float() - wanted) / self.deviations)[inside].pow(2).mean()


def phoneme_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy a frame of scores (B, F, classes); frames whose label in (B, F) is -100 do not count, and without others
    it is 0."""
    known = labels >= 0
    return F.cross_entropy(scores.float()[known], labels[known]) if known.any() else scores.new_zeros(())


class Speller(nn.Module):
    """A projector that reads the teacher's frames, or the student's own, and the lm_head that spells its slots."""

    lm_head: Tensor

    def __init__(self, projector: AudioProjector, backbone: Backbone, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.projector = projector
        self.tokenizer = tokenizer
        self.register_buffer("lm_head", backbone.lm_head_weight.detach().clone())
        self.softcap = backbone.softcap

    def ctc_loss(self, frames: Tensor, lengths: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
        """CTC loss a token of frames (B, F, width)."""
        slots, slot_lengths = self.projector(frames, lengths)
        targets = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in tokens], batch_first=True)
        counts = torch.tensor([len(row) for row in tokens])
        blank = self.tokenizer.pad_token_id
        with torch.autocast(slots.device.type, enabled=False):
            return lm_head_ctc_loss(slots.float(), self.lm_head, self.softcap, targets, slot_lengths, counts, blank)

    def draft(self, frames: Tensor, lengths: Tensor) -> list[str]:
        """Greedy transcripts."""
        slots, slot_lengths = self.projector(frames, lengths)
        drafts = lm_head_draft(slots, self.lm_head, self.softcap, slot_lengths, self.tokenizer.pad_token_id)
        return [self.tokenizer.decode([token.id for token in draft], skip_special_tokens=True) for draft in drafts]


def stretched(labels: Tensor, count: int) -> Tensor:
    """(count,) labels of frames that are heard faster or slower, from those (n,) of the frames as they were."""
    return labels[(torch.arange(count) * len(labels) // max(1, count)).clamp(max=len(labels) - 1)]


@torch.no_grad()
def folded(projector: AudioProjector, head: nn.Linear) -> AudioProjector:
    """The projector that does with a frame x what `projector` does with head(x)."""
    wide = copy.deepcopy(projector)
    wide.conv1.in_channels = head.in_features
    weight = torch.einsum("oik,ij->ojk", projector.conv1.weight, head.weight)
    wide.conv1.weight = nn.Parameter(weight.contiguous())
    return wide


def deviations_of(cache: FeatureCache, utterances: Sequence[Utterance], count: int = 200) -> Tensor:
    """(width,) standard deviation of each component of cached frames, over some utterances."""
    chosen = first_of(list(utterances), min(count, len(utterances)))
    frames, lengths = cache.batch(chosen)
    return frames[length_mask(lengths, frames.shape[1])].std(0)


def train_student(recipe: dict, folder: Path, start_from: str | Path | None = None) -> None:
    """Trains by a stage recipe, from nothing or from what `go_on` finds in `start_from`.

    Writes `folder/encoder`, `folder/heads.safetensors` and, where tokens have a weight, the projector of the student's own
    frames as an adapter without LoRA to `folder/projector`.

    Raises:
        DataError: a manifest is not there or the teacher's frames of an utterance are not in the cache.
        CheckpointError: tokenizer, backbone, projector or `start_from` cannot be read or do not fit.
    """
    data, weights, seed = recipe["data"], recipe["weights"], recipe["loop"]["seed"]
    tokenizer = AutoTokenizer.from_pretrained(recipe["backbone"])
    lists = [
        first_of(read_manifest(item["manifest"], (), data["max_duration_s"]), item.get("first")) for item in data["train"]
    ]
    train = [u for rows in lists for u in rows]
    dev = {name: read_manifest(path, (), data["max_duration_s"])[: data["dev_count"]] for name, path in data["dev"].items()}
    cache = None
    if "teacher_frames" in recipe:
        cache = FeatureCache.open(recipe["teacher_frames"], [*train, *(u for rows in dev.values() for u in rows)])
    phonemes = PhonemeTimes([item["phonemes"] for item in data["train"] if "phonemes" in item])
    tokens = [tokenizer.encode(plain_text(u.text, u.language), add_special_tokens=False) for u in train]
    torch.manual_seed(seed)
    # Whisper's layout has a decoder; this one, of the encoder's shape, is neither trained nor saved.
    decoder = {name.replace("encoder", "decoder"): size for name, size in recipe["model"].items() if "encoder" in name}
    config = whisper_config(tokenizer, **recipe["model"], **decoder)
    deviations = None if cache is None else deviations_of(cache, train)
    student = Student(AcousticEncoder.from_config(config), len(phonemes.symbols), deviations)
    student.acoustic.encoder.embed_positions.requires_grad_(False)
    student.acoustic.encoder.set_attn_implementation("eager")  # whole steps take a sixth less time than with fused attention
    if start_from is not None:
        go_on(student, Path(start_from))
    width = student.acoustic.hidden_size if cache is None else cache.width
    speller = _speller(recipe, tokenizer, width) if weights["tokens"] > 0 else None
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if speller is not None:
        trained |= {f"projector.{name}": p for name, p in speller.projector.named_parameters()}
    sizes = [len(rows) for rows in lists]
    shares = [size * item["weight"] for size, item in zip(tempered(sizes, data["temperature"]), data["train"], strict=True)]
    lengths = [round(100 * u.duration) for u in train]
    mixture = Mixture(sizes, shares, lengths, recipe["batch_frames"], 256, seed)
    masking = Masking(**recipe["masking"])
    dtype = compute_dtype(recipe["dtype"], torch.device("cpu"))
    options = LoopOptions(**recipe["loop"])

    def hear(utterances: Sequence[Utterance]) -> tuple[Tensor, Tensor]:
        return student.acoustic.features([read_sound(u.audio_filepath) for u in utterances])

    def loss_of(step: int, micro: int) -> tuple[Tensor, Metrics]:
        student.train()
        chosen = mixture.at(step * options.accumulation + micro)
        rows = [train[i] for i in chosen]
        mel, mel_lengths = hear(rows)
        mel = warp_frequencies(mel.transpose(1, 2), log_uniform(recipe["warp"], len(rows)))  # (B, T, bins)
        counts = ((mel_lengths + 1) // 2).tolist()
        labels = [phonemes.frames(u, n) for u, n in zip(rows, counts, strict=True)]
        if "tempo" in recipe:
            mel, mel_lengths = change_tempo(mel, mel_lengths, log_uniform(recipe["tempo"], len(rows)))
            labels = [stretched(row, n) for row, n in zip(labels, ((mel_lengths + 1) // 2).tolist(), strict=True)]
        mel = mask_bands(mel, mel_lengths, masking).transpose(1, 2)
        found: dict[str, Tensor] = {}
        with computing_in(dtype, torch.device("cpu")):
            frames, frame_lengths = student.acoustic(mel, mel_lengths)
            imitated = student.imitated(frames)
            if cache is not None:
                found["teacher"] = student.teacher_loss(imitated, cache.batch(rows)[0], frame_lengths)
            scores = student.phoneme_head(frames)
            found["phonemes"] = phoneme_loss(scores, nn.utils.rnn.pad_sequence(labels, True, -100))
            if speller is not None:
                found["tokens"] = speller.ctc_loss(imitated, frame_lengths, [tokens[i] for i in chosen])
        loss = torch.stack([weights[name] * value for name, value in found.items()]).sum()
        return loss, {name: value.item() for name, value in found.items()} | {"audio_s": float(mel_lengths.sum()) / 100}

    @torch.no_grad()
    def evaluate(step: int) -> Metrics:
        student.eval()
        figures: Metrics = {}
        for name, rows in dev.items():
            mel, mel_lengths = hear(rows)
            frames, frame_lengths = student.acoustic(mel, mel_lengths)
            imitated = student.imitated(frames)
            if cache is not None:
                error = student.teacher_loss(imitated, cache.batch(rows)[0], frame_lengths)
                figures[f"teacher_{name}"] = round(float(error), 4)
            if speller is not None:
                references = [plain_text(u.text, u.language) for u in rows]
                texts = speller.draft(imitated, frame_lengths)
                figures[f"token_wer_{name}"] = round(error_rate(references, texts, rows[0].language), 4)
                print(f"step {step} {name}: {references[0]} | {texts[0]}")
        print(figures, flush=True)
        return figures

    start = time.time()
    run(trained, loss_of, folder / "student-run", options, evaluate)
    if rank() > 0:
        return
    save_encoder(student.acoustic, folder / "encoder")
    heads = {name: value for name, value in student.state_dict().items() if "head" in name}
    save_file({name: value.contiguous() for name, value in heads.items()}, folder / HEADS)
    if speller is not None:
        head = student.teacher_head
        save_projector(speller.projector if head is None else folded(speller.projector, head), folder / "projector")
    hours = sum(u.duration for u in train) / 3600
    print(json.dumps({"stage": "student", "hours_of_sound": hours, "minutes": (time.time() - start) / 60}))


@torch.no_grad()
def go_on(student: Student, folder: Path) -> None:
    """Takes the encoder of `folder`, and the heads where it holds some that fit.

    Layers that the encoder there lacks begin as identities: what they add to their input is zero.

    Raises:
        CheckpointError: the encoder cannot be read, is of another width, or has more layers.
    """
    old = dict(AcousticEncoder.from_pretrained(folder / "encoder").encoder.named_parameters())
    new = dict(student.acoustic.encoder.named_parameters())
    there = {name.split(".")[1] for name in old if name.startswith("layers.")}
    grown = {name for name in new if name.startswith("layers.") and name.split(".")[1] not in there}
    for name in grown:
        if name.split(".")[-2] in ("out_proj", "fc2"):
            new[name].zero_()
    load_weights({name: p for name, p in new.items() if name not in grown}, old, folder)
    if (folder / HEADS).is_file():
        heads = {name: p for name, p in student.named_parameters() if "head" in name}
        old = {name: value for name, value in load_file(folder / HEADS).items() if name in heads}
        fitting = {name for name, value in old.items() if value.shape == heads[name].shape}
        load_weights({name: heads[name] for name in fitting}, {name: old[name] for name in fitting}, folder / HEADS)


def _speller(recipe: dict, tokenizer: PreTrainedTokenizerBase, width: int) -> Speller:
    backbone = Backbone.from_pretrained(recipe["backbone"])
    shape = from_mapping(ProjectorRecipe, recipe["projector"])
    projector = new_projector(shape, width, backbone.hidden_size, backbone.embedding_scale())
    assert isinstance(projector, AudioProjector)
    saved = read_projector(recipe["projector_from"]) | {"scale": projector.scale}
    load_weights(projector.state_dict(), saved, recipe["projector_from"])
    return Speller(projector, backbone, tokenizer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train an encoder of our own on a larger one's frames.")
    parser.add_argument("recipe", help="stage recipe, YAML")
    parser.add_argument("folder", help="run folder")
    parser.add_argument("--start_from", help="folder of an earlier run or checkpoint, whose encoder to go on with")
    args = parser.parse_args()
    join_workers()
    train_student(yaml.safe_load(Path(args.recipe).read_text(encoding="utf-8")), Path(args.folder), args.start_from)
