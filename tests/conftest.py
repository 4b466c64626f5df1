"""Fixtures that many test files share: tiny checkpoints in the real layout, written once per run."""

from __future__ import annotations

import os

# No test may reach for a network. Set before anything imports huggingface_hub, which reads this once.
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest
import tiny
import torch

torch.set_num_threads(1)  # tests work on tiny tensors, for which threads cost more than they give


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone, as google/diffusiongemma-26B-A4B-it."""
    return tiny.write_backbone(tmp_path_factory.mktemp("tiny") / "diffusiongemma")


@pytest.fixture(scope="session")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Whisper, as openai/whisper-small: 80 mel bins, encoder and decoder."""
    return tiny.write_whisper(tmp_path_factory.mktemp("tiny") / "whisper")


@pytest.fixture(scope="session")
def whisper_128_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Whisper, as openai/whisper-large-v3: 128 mel bins, wider than `whisper_folder`."""
    return tiny.write_whisper(tmp_path_factory.mktemp("tiny") / "whisper-128", width=24, mel_bins=128)
