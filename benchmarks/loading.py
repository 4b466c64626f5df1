"""Memory of loading: a random checkpoint of 2 GB in the real layout, read on the processor in a process of its own.

    python benchmarks/loading.py            benchmarks/results/loading.json and the table in docs/memory.md; Linux

The checkpoint has a sharded backbone with both stacks tied, Whisper small's encoder, a projector and LoRA, all bfloat16, and
is deleted afterwards. What the process held before, with all modules imported and a small model loaded and dropped, is
subtracted from the peak. Weights are mapped, not read, until something needs them; so each is read once before the peak is
taken.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from full_size import TOKENIZER, filled
from pages import RESULTS, ROOT, circumstances, fill, markdown, read_results, stated, write_results
from transformers import AutoTokenizer, PreTrainedTokenizerBase, WhisperConfig

from diffusion_gemma_asr.checkpoint.known_configs import whisper_small
from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.checkpoint.save import save_checkpoint
from diffusion_gemma_asr.memory import give_back_memory
from diffusion_gemma_asr.model.backbone import Backbone
from diffusion_gemma_asr.model.config import BackboneConfig, EncoderConfig, ModelConfig, ProjectorConfig
from diffusion_gemma_asr.model.encoder import AcousticEncoder
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.model.projector import AudioProjector
from diffusion_gemma_asr.train.mini.backbone_config import BackboneShape, small_config

DATA, PAGE = RESULTS / "loading.json", ROOT / "docs/memory.md"
BOUND = 1.15  # of the checkpoint's size, as stored
# The experts have the real backbone's share of the weights, its attention as well.
SHAPE = BackboneShape(
    hidden=1024, layers=12, heads=16, head_dim=64, intermediate=768, experts=72, top_k=8, expert_intermediate=352
)
DTYPES = (None, "float32")


def write_checkpoint(
    folder: Path, shape: BackboneShape = SHAPE, whisper: WhisperConfig | None = None, shard: str = "500MB"
) -> int:
    """Writes a random checkpoint with its frozen parts inside; returns the bytes of its weights.

    Args:
        folder: where to write.
        shape: of the backbone.
        whisper: configuration of the encoder; Whisper small's by default.
        shard: largest size of a file of the backbone's weights.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TOKENIZER)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with init_empty_weights():
            empty = Backbone.from_config(small_config(tokenizer, shape))
        backbone = filled(empty, "cpu")
        encoder = AcousticEncoder.from_config(whisper or whisper_small())
        projector = AudioProjector(ProjectorConfig(), encoder.hidden_size, backbone.hidden_size)
    finally:
        torch.set_default_dtype(before)
    backbone.model.save_pretrained(folder / "backbone", max_shard_size=shard)
    tokenizer.save_pretrained(folder / "backbone")
    encoder.encoder.save_pretrained(folder / "encoder")
    encoder.extractor.save_pretrained(folder / "encoder")
    backbone.add_lora()
    config = ModelConfig("random", EncoderConfig(str(folder / "encoder")), BackboneConfig(str(folder / "backbone")))
    save_checkpoint(DiffusionGemmaASR(config, encoder, projector, backbone, tokenizer), folder)
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def memory() -> dict[str, int]:
    """Bytes that this process holds (VmRSS), of these in mapped files (RssFile), and held at most (VmHWM)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0] in ("VmRSS:", "RssFile:", "VmHWM:")}


def measure(folder: Path, dtype: str | None = None) -> dict[str, int]:
    """Loads a checkpoint and reads all its weights in this process; returns the bytes that were held at most beyond those
    before, and what of these were pages of the files, which the system takes back where it needs room."""
    load_checkpoint("mini", device="cpu")  # imports what is imported late
    gc.collect()
    give_back_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory()
    model = load_checkpoint(folder, device="cpu", dtype=dtype)
    loaded = memory()
    for weight in model.parameters():
        weight.flatten()[::512].sum()  # one in each page of 4 KB at least
    after = memory()
    return {
        "while_loading": loaded["VmHWM"] - before["VmRSS"],
        "peak": after["VmHWM"] - before["VmRSS"],
        "mapped": after["RssFile"] - before["RssFile"],
        "weights": sum(weight.nbytes for weight in model.parameters()),
    }


def measure_apart(folder: Path, dtype: str | None = None) -> dict[str, int]:
    """`measure` in a process of its own, whose glibc maps large blocks as that of a new process does: freeing the model that
    `measure` loads first would change that."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    command = [sys.executable, __file__, "--measure", str(folder), *([] if dtype is None else ["--dtype", dtype])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


HEADING = [
    "weights",
    "checkpoint",
    "in memory",
    "held while loading",
    "held when all was read",
    "of it mapped files",
    "times the checkpoint",
]


def table(measured: dict[str, Any]) -> str:
    """One line for each dtype."""
    rows = []
    for name, part in measured["parts"].items():
        sizes = [measured["checkpoint"], part["weights"], part["while_loading"], part["peak"], max(0, part["mapped"])]
        rows.append([name, *(f"{size / 1e9:.2f} GB" for size in sizes), f"{part['peak'] / measured['checkpoint']:.2f}"])
    return "\n".join([markdown(HEADING, rows), "", f"{stated(measured['circumstances'])}."])


def main() -> None:
    """Measures, writes the figures and fills the page."""
    parser = argparse.ArgumentParser(description="Memory of loading a checkpoint.")
    parser.add_argument("--measure", type=Path, help="load this checkpoint in this process and print what it took")
    parser.add_argument("--dtype", help="of --measure")
    parser.add_argument("--report", action="store_true", help="fill the page with what was measured")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.dtype)))
        return
    if not args.report:
        with tempfile.TemporaryDirectory() as folder:
            size = write_checkpoint(Path(folder))
            parts = {dtype or "as stored": measure_apart(Path(folder), dtype) for dtype in DTYPES}
        write_results(DATA, {"checkpoint": size, "parts": parts, "circumstances": circumstances()})
    fill(PAGE, {"loading": table(read_results(DATA))})


if __name__ == "__main__":
    main()
