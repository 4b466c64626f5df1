"""baselines/whisfusion.py, transfusion.py, whisper_decoder.py and trained.py: by hand, and one path from recipe to texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sounds import tone, write
from torch import Tensor, nn

from diffusion_gemma_asr.baselines.canvas_decoder import CanvasDecoder
from diffusion_gemma_asr.baselines.trained import TrainedBaseline, load_baseline_recipe
from diffusion_gemma_asr.baselines.transfusion import LEVELS, CharacterDiffusion, cosine_schedule
from diffusion_gemma_asr.baselines.whisfusion import CANDIDATES, MaskDiffusion
from diffusion_gemma_asr.baselines.whisper_decoder import WhisperDecoder
from diffusion_gemma_asr.cli import main
from diffusion_gemma_asr.data.manifest import Utterance, write_manifest
from diffusion_gemma_asr.data.text import CHARACTERS
from diffusion_gemma_asr.errors import CheckpointError, RecipeError
from diffusion_gemma_asr.objective import write_canvas
from diffusion_gemma_asr.train.baseline import is_baseline, train_baseline

SIZES = {"width": 16, "layers": 1, "heads": 2, "ffn": 32, "dropout": 0.0}


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(0) for _ in range(count)]


class Oracle(nn.Module):
    """A decoder that finds the right symbols the surer the earlier they stand, and records what it is shown."""

    def __init__(self, right: Tensor, symbols: int, sharpness: float = 20.0):
        super().__init__()
        self.right, self.sharpness = right, sharpness
        self.embed = nn.Embedding(symbols, 2)
        self.shown: list[Tensor] = []

    def forward(self, canvas: Tensor, *_: Any) -> Tensor:
        self.shown.append(canvas.clone())
        logits = torch.zeros(*canvas.shape, self.embed.num_embeddings)
        falling = self.sharpness * torch.linspace(1, 0.5, canvas.shape[1])
        return logits.scatter(-1, self.right[..., None], falling.expand(canvas.shape)[..., None])


# -- absorbing masks -----------------------------------------------------------------------------------------


def test_masks_are_filled_surest_first_in_so_many_passes() -> None:
    right = torch.tensor([[3, 4, 5, 1, 1, 1], [6, 1, 1, 1, 1, 1]])
    decoder = Oracle(right, 9)
    net = MaskDiffusion(decoder, 1, steps=3)  # type: ignore[arg-type]
    frames, lengths = torch.zeros(2, 25, 8), torch.tensor([25, 8])  # 4 and 1 slots: 6 and 3 positions
    assert net.decode(frames, lengths, generators(2)) == [[3, 4, 5], [6]]
    assert len(decoder.shown) == 3 * CANDIDATES
    masked = [(canvas == net.mask).tolist() for canvas in decoder.shown[:3]]
    assert masked[0][0] == [True] * 6
    assert masked[1][0] == [False] * 2 + [True] * 4 and masked[2][0] == [False] * 4 + [True] * 2
    assert masked[1][1][:3] == [False, True, True]


def test_the_surest_candidate_wins() -> None:
    """With chances so flat that draws differ, the greedy first candidate is the surest."""
    right = torch.tensor([[3, 4, 5, 1, 1, 1]])
    net = MaskDiffusion(Oracle(right, 9, sharpness=2.0), 1, steps=2)  # type: ignore[arg-type]
    frames, lengths = torch.zeros(1, 25, 8), torch.tensor([25])
    assert net.decode(frames, lengths, generators(1)) == [[3, 4, 5]]


def test_only_masked_positions_are_learnt() -> None:
    class Deaf(Oracle):
        def forward(self, canvas: Tensor, *rest: Any) -> Tensor:
            return super().forward(canvas, *rest) * (canvas == 8)[..., None]  # right where masked, flat elsewhere

    right = torch.tensor([[3, 4, 5, 1, 1, 1]] * 32)
    net = MaskDiffusion(Deaf(right, 9, sharpness=100.0), 1, steps=2)  # type: ignore[arg-type]
    loss = net.loss(torch.zeros(32, 25, 8), torch.full((32,), 25), [[3, 4, 5]] * 32)
    assert loss.item() < 1e-3


# -- multinomial diffusion -----------------------------------------------------------------------------------


def test_the_schedule_falls_from_all_to_nothing() -> None:
    kept = cosine_schedule(LEVELS)
    assert kept[0] == 1 and kept[-1] < 1e-4 and (kept.diff() < 0).all()


def test_the_posterior_is_bayes_rule() -> None:
    """q(before | now, clean) = q(now | before) q(before | clean) / q(now | clean), from the matrices of single steps."""
    net = CharacterDiffusion(CanvasDecoder(4, 8, **SIZES, timed=True))
    level = torch.tensor([1, 70, LEVELS])
    before, now = net.kept[level - 1].double(), net.kept[level].double()
    uniform = torch.full((4, 4), 1 / 4, dtype=torch.float64)
    noisy, clean = torch.tensor([[2, 0]] * 3), torch.tensor([[2, 1]] * 3)
    found = net.posterior(noisy, torch.nn.functional.one_hot(clean, 4).float(), level)
    for row in range(3):
        forward = before[row] * torch.eye(4).double() + (1 - before[row]) * uniform  # [clean, before]
        stays = now[row] / before[row]
        step = stays * torch.eye(4).double() + (1 - stays) * uniform  # [before, now]
        for place in range(2):
            joint = forward[clean[row, place]] * step[:, noisy[row, place]]
            torch.testing.assert_close(found[row, place].double(), joint / joint.sum(), atol=1e-5, rtol=1e-4)


def test_a_decoder_that_knows_writes_the_transcript() -> None:
    text = [CHARACTERS.index(c) for c in "by the sea"]
    right = write_canvas([text], 27, 0)
    net = CharacterDiffusion(Oracle(right, len(CHARACTERS)))  # type: ignore[arg-type]
    assert net.decode(torch.zeros(1, 50, 8), torch.tensor([50]), generators(1)) == [text]
    assert len(net.decoder.shown) == 2 * LEVELS
    net.decode(torch.zeros(1, 50, 8), torch.tensor([50]), generators(1), guidance=0.0)
    assert len(net.decoder.shown) == 3 * LEVELS
    assert net.loss(torch.zeros(1, 50, 8), torch.tensor([50]), [text]).item() < 0.05


def test_rows_that_do_not_hear_do_not_hear() -> None:
    decoder = CanvasDecoder(5, 8, **SIZES, timed=True).eval()
    canvas, lengths = torch.tensor([[1, 2, 3]] * 2), torch.tensor([3, 3])
    level, heard = torch.tensor([0.5, 0.5]), torch.tensor([True, False])
    first, second = (
        decoder(canvas, lengths, torch.randn(2, 6, 8), torch.tensor([6, 6]), level, heard) for _ in range(2)
    )
    assert not torch.allclose(first[0], second[0])
    torch.testing.assert_close(first[1], second[1])


def test_padding_changes_nothing() -> None:
    decoder = CanvasDecoder(5, 8, **SIZES).eval()
    frames = torch.randn(1, 6, 8)
    alone = decoder(torch.tensor([[1, 2, 3]]), torch.tensor([3]), frames, torch.tensor([6]))
    padded = decoder(
        torch.tensor([[1, 2, 3, 4, 4]]), torch.tensor([3]), torch.cat([frames, torch.randn(1, 3, 8)], 1), torch.tensor([6])
    )
    torch.testing.assert_close(alone, padded[:, :3], atol=1e-5, rtol=1e-4)


# -- token after token ---------------------------------------------------------------------------------------


def whisper_decoder() -> WhisperDecoder:
    torch.manual_seed(2)
    net = WhisperDecoder(40, 16, **SIZES, begin=1, end=2, pad=0).eval()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.4
    return net


@torch.no_grad()
def test_the_yardstick_writes_what_it_finds_most_probable_until_its_end() -> None:
    net, frames = whisper_decoder(), torch.randn(2, 12, 16)
    found = net.decode(frames, torch.tensor([12, 12]), generators(2))
    for row, own in zip(found, frames, strict=True):
        ids = [1]
        while len(ids) <= 12 and ids[-1] != 2:
            decoder = net.model.model.decoder
            hidden = decoder(input_ids=torch.tensor([ids]), encoder_hidden_states=own[None]).last_hidden_state
            ids.append(int(net.model.proj_out(hidden)[0, -1].argmax()))
        assert row == [i for i in ids[1:] if i != 2]
        assert net.passes(row) == len(row) + 1


@torch.no_grad()
def test_the_yardstick_learns_every_token_and_the_end() -> None:
    net, frames = whisper_decoder(), torch.randn(2, 12, 16)
    losses = [net.loss(frames[i : i + 1], torch.tensor([12]), [row]) for i, row in enumerate([[5, 6, 7], [8]])]
    both = net.loss(frames, torch.tensor([12, 12]), [[5, 6, 7], [8]])
    torch.testing.assert_close(both, (4 * losses[0] + 2 * losses[1]) / 6)
    with pytest.raises(RecipeError, match=r"decoder\.width to 24"):
        WhisperDecoder(40, 24, **SIZES, begin=1, end=2, pad=0)


# -- from recipe to texts ------------------------------------------------------------------------------------


def write_recipe(folder: Path, baseline: str, whisper: Path, backbone: Path, **changes: Any) -> Path:
    rows = []
    for i, text in enumerate(("the fox", "by the sea", "lazy dog")):
        sound = write(folder / f"{i}.wav", tone(220 + 150 * i, 1.0 + 0.3 * i))
        rows.append(Utterance(str(sound), text, "en", 1.0 + 0.3 * i))
    write_manifest(folder / "list.jsonl", rows)
    content: dict[str, Any] = {
        "baseline": baseline, "name": "tiny", "encoder": {"name": str(whisper)}, "decoder": SIZES, "steps": 2,
        "train": {"steps": 4, "batch_size": 2, "lr": 0.01, "eval_every": 4, "save_every": 2},
        "data": {"train": [{"manifest": str(folder / "list.jsonl")}], "dev": [str(folder / "list.jsonl")]},
    }  # fmt: skip
    if baseline != "transfusion":
        content["tokenizer"] = {"name": str(backbone)}
    path = folder / f"{baseline}.yaml"
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return path


@pytest.mark.parametrize("baseline", ["whisfusion", "transfusion", "whisper"])
def test_a_recipe_becomes_a_system(baseline: str, tmp_path: Path, whisper_folder: Path, backbone_folder: Path) -> None:
    path = write_recipe(tmp_path, baseline, whisper_folder, backbone_folder)
    assert is_baseline(path) and not is_baseline("small")
    checkpoint = train_baseline(load_baseline_recipe(path), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4] and all(record["loss"] > 0 for record in records)
    assert any(key.startswith("wer_") for key in records[-1]["evaluation"])

    system = TrainedBaseline.load(checkpoint)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["weights"]
    own = dict(system.net.named_parameters())
    assert own.keys() == state.keys() and all(torch.equal(own[name], value) for name, value in state.items())
    clips = [tone(300, 1.0), tone(500, 1.6)]
    together = system.transcribe(clips, ["en", "en"])
    if baseline != "whisper":
        assert together[0].passes == (2 * CANDIDATES if baseline == "whisfusion" else 2 * LEVELS)
    if baseline == "whisfusion":  # 400 passes of an untrained decoder are too sensitive to rounding
        assert [system.transcribe([clip], ["en"])[0] for clip in clips] == together

    out = tmp_path / "evaluated"
    with pytest.raises(SystemExit) as done:
        main(["evaluate", str(tmp_path / "list.jsonl"), "--out", str(out), "--system", "baseline", "--model",
              str(checkpoint)])  # fmt: skip
    assert done.value.code == 0
    assert json.loads((out / "summary.json").read_text())["settings"]["system"] == baseline


def test_bad_recipes_and_folders_are_told(tmp_path: Path, whisper_folder: Path, backbone_folder: Path) -> None:
    path = write_recipe(tmp_path, "transfusion", whisper_folder, backbone_folder, tokenizer={"name": str(backbone_folder)})
    with pytest.raises(RecipeError, match=r"transfusion\.yaml: 'tokenizer' must be given for whisfusion"):
        load_baseline_recipe(path)
    with pytest.raises(CheckpointError, match=r"no baseline\.json here"):
        TrainedBaseline.load(tmp_path)
