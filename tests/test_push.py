"""Checkpoints onto a hub: every file that loading opens goes along, and nothing that nobody else has is needed."""

from __future__ import annotations

import fnmatch
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from fake_hub import FakeHub
from tiny_model import clips

from diffusion_gemma_asr.app.push import scores_of
from diffusion_gemma_asr.checkpoint.card import published_card
from diffusion_gemma_asr.checkpoint.load import DEFAULT_MODEL, find_checkpoint, load_checkpoint
from diffusion_gemma_asr.checkpoint.push import checkpoint_files, push_to_hub
from diffusion_gemma_asr.checkpoint.save import save_checkpoint
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.errors import CheckpointError, DataError
from diffusion_gemma_asr.model.config import BackboneConfig, EncoderConfig, ModelConfig
from diffusion_gemma_asr.model.model import DiffusionGemmaASR


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny.build_model(tiny.model_config(whisper_folder, backbone_folder))


def saved(model: DiffusionGemmaASR, folder: Path, encoder: str, backbone: str) -> Path:
    """A checkpoint of the model that names other frozen parts."""
    config = replace(model.config, encoder=EncoderConfig(encoder), backbone=BackboneConfig(backbone))
    other = DiffusionGemmaASR(config, model.encoder, model.projector, model.backbone, model.tokenizer)
    return save_checkpoint(other, folder)


@pytest.fixture
def bundle(model: DiffusionGemmaASR, tmp_path: Path) -> Path:
    """A checkpoint with its frozen parts inside."""
    folder = tmp_path / "bundle"
    shutil.copytree(model.config.encoder.name, folder / "encoder")
    shutil.copytree(model.config.backbone.name, folder / "backbone")
    return saved(model, folder, str(folder / "encoder"), str(folder / "backbone"))


def change(folder: Path, **content: Any) -> None:
    """Writes keys of config.json anew."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | content))


def copied(folder: Path, target: Path) -> Path:
    """A copy of the files alone that pushing would upload."""
    patterns = checkpoint_files(folder)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    return target


def test_the_bundled_model_loads_from_the_files_that_pushing_uploads(tmp_path: Path) -> None:
    folder = find_checkpoint(DEFAULT_MODEL)
    audio, options = clips([30_000, 16_000]), DecodeOptions(language="en")
    texts = []
    for source in (folder, copied(folder, tmp_path / "copy")):
        loaded = load_checkpoint(source, device="cpu")
        texts.append([decoded.text for decoded in decode_clips(loaded, audio, options)])
    assert texts[0] == texts[1]


def test_folders_inside_go_along_and_those_outside_are_refused(
    bundle: Path, tmp_path: Path, model: DiffusionGemmaASR
) -> None:
    assert checkpoint_files(bundle)[4:] == ["encoder/*", "backbone/*"]
    config = json.loads((bundle / "config.json").read_text())
    change(bundle, encoder=config["encoder"] | {"name": "./encoder"})
    assert checkpoint_files(bundle)[4:] == ["encoder/*", "backbone/*"]
    (bundle / "encoder").rename(tmp_path / "encoder")
    for name in ("../encoder", str(tmp_path / "encoder")):
        change(bundle, encoder=config["encoder"] | {"name": name})
        load_checkpoint(bundle, device="cpu")
        with pytest.raises(CheckpointError, match=f"names the local folder {name}, which nobody else has"):
            checkpoint_files(bundle)


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    yield server
    server.shutdown()


def command(hub: FakeHub, home: Path, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the program in a process of its own."""
    program = [sys.executable, "-m", "diffusion_gemma_asr", *map(str, arguments)]
    done = subprocess.run(program, env=hub.environment(home), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def python(hub: FakeHub, home: Path, code: str) -> str:
    """What Python code prints in a process that talks to the hub."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=hub.environment(home), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_file_of_the_bundled_model_comes_back_from_a_hub(hub: FakeHub, tmp_path: Path) -> None:
    code = """
from diffusion_gemma_asr.app.push import scores_of
from diffusion_gemma_asr.checkpoint.card import published_card
from diffusion_gemma_asr.checkpoint.load import find_checkpoint
from diffusion_gemma_asr.checkpoint.push import push_to_hub
push_to_hub(find_checkpoint("mini"), "bundled/mini")
print(find_checkpoint("bundled/mini"))
"""
    folder, source = Path(python(hub, tmp_path / "home", code).strip()), find_checkpoint(DEFAULT_MODEL)
    own = {p.relative_to(source): p for p in source.rglob("*") if p.is_file()}
    back = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    assert back.keys() == own.keys() | {Path(".gitattributes")}
    assert [p for p in own if own[p].read_bytes() != back[p].read_bytes() and p.name != "README.md"] == []
    _, header, text = (folder / "README.md").read_text().split("---", 2)
    told = yaml.safe_load(header)
    assert (told["library_name"], told["pipeline_tag"]) == ("diffusion-gemma-asr", "automatic-speech-recognition")
    assert "base_model" not in told and text == (source / "README.md").read_text().split("---", 2)[2]


def test_a_branch_is_pushed_by_the_command_and_loaded_by_name_and_revision(
    bundle: Path, hub: FakeHub, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    run = tmp_path / "run"
    run.mkdir()
    rates = {"en": {"error_rate": 0.1234, "unit": "word"}, "hi": {"error_rate": 0.056, "unit": "character"}}
    (run / "summary.json").write_text(json.dumps({"data_sets": {"fleurs": rates}, "languages": rates}))
    status, out, err = command(hub, home, "push", bundle, "me/asr", "--private", "--revision", "v1", "--results", run)
    assert status == 0, err
    assert out.startswith(f"{hub.address}/me/asr/commit/") and hub.private["me/asr"]
    assert set(hub.files("me/asr")) == {".gitattributes"}  # the main branch is as it was
    uploaded = hub.files("me/asr", "v1")
    assert {"adapter.safetensors", "encoder/config.json", "backbone/tokenizer.json"} < set(uploaded)
    assert any(method == "PUT" for method, _ in hub.requests)  # the large files went their way
    card = uploaded["README.md"].decode()
    header = yaml.safe_load(card.split("---")[1])
    (entry,) = header["model-index"]
    found = [(r["dataset"]["name"], r["dataset"]["config"], r["metrics"][0]["type"], r["metrics"][0]["value"])
             for r in entry["results"]]  # fmt: skip
    assert found == [("fleurs", "en", "wer", 12.34), ("fleurs", "hi", "cer", 5.6)]
    assert "| fleurs | en | WER 12.34 % |" in card and "Not measured" not in card
    assert "model-index" not in (bundle / "README.md").read_text()  # the folder's own card stays

    code = f"""
import numpy, diffusion_gemma_asr as asr
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
sound = numpy.random.default_rng(0).standard_normal(16000).astype("float32") / 10
for name, options in (("me/asr", {{"revision": "v1"}}), ({str(bundle)!r}, {{}})):
    model = asr.load(name, device="cpu", **options)
    print(decode_clips(model.model, [sound], DecodeOptions(language="en"))[0].tokens)
try:
    asr.load("me/asr", revision="v2")
except asr.AsrError as error:
    print(error)
"""
    fetched, own, refused = python(hub, home, code).splitlines()
    assert fetched == own and len(own) > 10
    assert "me/asr is no folder here and cannot be fetched from the hub" in refused


def test_a_hub_that_refuses_or_is_not_there_costs_one_line(
    bundle: Path, hub: FakeHub, tmp_path: Path, model: DiffusionGemmaASR
) -> None:
    status, out, err = command(hub, tmp_path, "push", bundle, "not/mine")
    assert (status, out, err.count("\n")) == (1, "", 1) and "cannot upload to not/mine: " in err and "403" in err
    with pytest.raises(DataError, match="holds no finished run; give a folder that `evaluate --out` wrote"):
        scores_of(tmp_path)
    local = save_checkpoint(model, tmp_path / "local")
    with pytest.raises(CheckpointError, match=r"names the local folder .*, which nobody else has"):
        push_to_hub(local, "me/asr")
    with pytest.raises(CheckpointError, match=r"cannot upload to me/asr: "):  # this process has no network
        push_to_hub(bundle, "me/asr")
    (bundle / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(CheckpointError, match=r"README\.md cannot be read: .*save the checkpoint again"):
        push_to_hub(bundle, "me/asr")


def test_a_card_names_both_frozen_parts_and_keeps_what_its_owner_wrote() -> None:
    config = ModelConfig("x", EncoderConfig("openai/whisper-small"), BackboneConfig("google/diffusiongemma-26B-A4B-it"))
    text = published_card("---\nlicense: mit\ntags:\n- mine\nlanguage: fr\n---\n\nMy words.\n", config)
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == ["openai/whisper-small", "google/diffusiongemma-26B-A4B-it"]
    assert (header["license"], header["tags"], header["language"]) == ("mit", ["mine"], ["en"])
    assert text.endswith("\n\nMy words.\n")
