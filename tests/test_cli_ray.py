"""`transcribe --ray`: the work of one of Ray's actors, and a cluster of two simulated machines of which one is lost."""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Loader, Run, loader, model, run, sound  # noqa: F401
from sounds import tone, write, write_wav
from spoken import PitchModel, Sound

from diffusion_gemma_asr.app.inputs import InputOptions, Recording
from diffusion_gemma_asr.app.jobs import Job, OutputOptions, make_jobs
from diffusion_gemma_asr.app.loading import LoadOptions
from diffusion_gemma_asr.app.on_ray import FILES, Plan, Transcriber
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.model.drafts import Encoded
from diffusion_gemma_asr.transcribe.recognizer import Recognizer
from diffusion_gemma_asr.transcribe.recordings import TranscribeOptions

# -- one actor -------------------------------------------------------------------------------------------------


class Poisoned(PitchModel):
    """Fails whenever it hears a sound of 0.5 s."""

    def encode(self, audio: Sequence[Sound]) -> Encoded:
        if any(len(samples) == 8_000 for samples in audio):
            raise RuntimeError("out of memory\nmore about that")
        return super().encode(audio)


def jobs_of(files: Sequence[Path], folder: Path, **options: Any) -> list[Job]:
    chosen = TranscribeOptions(vad_method="energy", **options)
    jobs = make_jobs([Recording(file) for file in files], InputOptions(), OutputOptions(output_dir=str(folder)), chosen)
    return [pickle.loads(pickle.dumps(job)) for job in jobs]


def transcriber(folder: Path, load: Any) -> Transcriber:
    return Transcriber(Plan(LoadOptions(), OutputOptions(output_dir=str(folder)), os.getcwd(), load))


def test_errors_are_results(tmp_path: Path) -> None:
    """A file that the model fails on costs the others of its task nothing."""
    files = [write(tmp_path / f"{n}.wav", tone(400 + 20 * n, 0.5 if n == 2 else 0.3)) for n in range(5)]
    text = tmp_path / "text.wav"
    text.write_text("hello")
    jobs = jobs_of([*files[:2], text, *files[2:]], tmp_path / "out")
    results = list(transcriber(tmp_path / "out", Loader(Poisoned())).results(jobs))
    assert [result.file for result in results] == [*files[:2], text, *files[2:]]
    errors = {Path(result.file).stem: result.errors for result in results if result.errors}
    assert errors.keys() == {"text", "2"} and errors["text"][0].startswith(f"{text}: cannot be read as sound")
    assert errors["2"] == (f"{files[2]}: failed (RuntimeError: out of memory)",)
    assert sum(result.sound_s for result in results) == pytest.approx(1.2)
    written = {path.stem: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert written == {str(n): f"{400 + 20 * n} hertz\n" for n in (0, 1, 3, 4)}


def test_a_task_that_comes_again_does_the_rest(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.wav", tone(400 + 20 * n, 0.3)) for n in range(3)]
    jobs, model = jobs_of(files, tmp_path / "out"), PitchModel()
    (tmp_path / "out" / "1.txt").write_text("from a machine that was lost")
    results = list(transcriber(tmp_path / "out", Loader(model)).results(jobs))
    assert sorted(Path(result.file).stem for result in results) == ["0", "1", "2"] and not any(r.errors for r in results)
    assert sum(map(len, model.batches)) == 2
    assert (tmp_path / "out" / "1.txt").read_text() == "from a machine that was lost"


def test_what_concerns_every_file_is_said_once(tmp_path: Path, sound: Path) -> None:
    def load(name: str, **how: object) -> Recognizer:
        raise CheckpointError("folder/config.json: no such file")

    jobs = jobs_of([sound, sound.with_name("b.wav")], tmp_path / "out")
    (result,) = transcriber(tmp_path / "out", load).results(jobs)
    assert result.fatal and result.errors == ("folder/config.json: no such file",)
    (job,) = jobs_of([sound], tmp_path / "out", decode=DecodeOptions(language="hi"))
    (result,) = transcriber(tmp_path / "out", Loader()).results([job])
    assert result.fatal and "was not trained for language 'hi'" in result.errors[0]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--ray"], "--ray needs --output_dir"),
        (["--ray", "-o", "out", "--watch"], "goes without standard input, --verbose and --watch"),
        (["--ray", "-o", "out", "-"], "goes without standard input, --verbose and --watch"),
        (["--workers", "2", "-o", "out"], "options of --ray"),
        (["--gpus_per_worker", "0.5"], "options of --ray"),
        (["--ray", "--workers", "0", "-o", "out"], "workers"),
        (["--ray", "--gpus_per_worker", "-1", "-o", "out"], "gpus_per_worker"),
    ],
)
def test_options_that_do_not_go_together(
    run: Run, loader: Loader, sound: Path, arguments: list[str], complaint: str
) -> None:
    outcome = run("transcribe", sound, *arguments)
    assert outcome.status == 2 and complaint in outcome.complaint and loader.asked == []


def test_without_ray(run: Run, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = run("transcribe", "--ray", sound, "-o", tmp_path / "out")
    assert outcome.status == 1
    assert outcome.err == "error: --ray needs the extra [ray]: pip install 'diffusion-gemma-asr[ray]'\n"


# -- a cluster -------------------------------------------------------------------------------------------------


class Noted(PitchModel):
    """Takes its time, and notes in a file on which machine it hears how many sounds; waits for so many machines to begin."""

    def __init__(self, log: Path, machines: int = 1):
        super().__init__()
        self.log, self.machines = log, machines

    def encode(self, audio: Sequence[Sound]) -> Encoded:
        import ray

        time.sleep(0.05)
        with self.log.open("a") as file:
            file.write(f"{ray.get_runtime_context().get_node_id()} {len(audio)}\n")
        until = time.monotonic() + 60
        while len({node for node, _ in heard(self.log)}) < self.machines and time.monotonic() < until:
            time.sleep(0.05)
        return super().encode(audio)


def heard(log: Path) -> list[list[str]]:
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two machines of one processor."""
    pytest.importorskip("ray.data", reason="needs the extra [ray]")
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 100 << 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the workers have to find the models of the tests
        head = {**size, "include_dashboard": False}
        try:
            cluster = Cluster(initialize_head=True, head_node_args=head)
        except Exception:  # Ray gives a head 30 s to start, which a busy computer may need once more
            cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(**size)
        yield cluster
        cluster.shutdown()


@pytest.mark.slow
def test_a_machine_is_lost(run: Run, cluster: Any, tmp_path: Path) -> None:
    count, out, log = 160, tmp_path / "out", tmp_path / "log"
    for n in range(count):
        (tmp_path / f"{n:03}.wav").write_bytes(write_wav(tone(400 + 20 * n, 0.3)))
    text, missing = tmp_path / "text.wav", tmp_path / "missing.wav"
    text.write_text("hello")
    (lost,) = cluster.worker_nodes
    before: dict[Path, int] = {}
    ended = threading.Event()

    def lose() -> None:
        """A machine, when it has heard something."""
        while lost.node_id not in [node for node, _ in heard(log)] or len(list(out.glob("*.json"))) < 40:
            if ended.wait(0.02):
                return
        cluster.remove_node(lost, allow_graceful=False)
        before.update({path: path.stat().st_mtime_ns for path in out.glob("*.json")})

    thread = threading.Thread(target=lose)
    thread.start()
    command = ("transcribe", tmp_path / "*.wav", missing, "-o", out, "-f", "json", "--batch_size", "4", "--print_progress")
    outcome = run(*command, "--ray", cluster.address, load=Loader(Noted(log, machines=2)))
    ended.set()
    thread.join()

    assert 40 <= len(before) < count, "the machine was not lost in the middle"
    texts = {path.stem: json.loads(path.read_text())["text"] for path in out.glob("*.json")}
    assert texts == {f"{n:03}": f"{400 + 20 * n} hertz" for n in range(count)}
    assert {path: path.stat().st_mtime_ns for path in before} == before  # none is made twice
    assert count <= sum(int(sounds) for _, sounds in heard(log)) <= count + FILES
    assert outcome.status == 1
    complaints = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(complaints) == 3 and complaints[-1].startswith("error: 2 of 162 files failed: ")
    for path in (text, missing):
        assert str(path) in complaints[-1] and any(line.startswith(f"error: {path}: ") for line in complaints[:2])
    assert "progress: " in outcome.err and " s left" in outcome.err and "s of sound in " in outcome.err

    again = run(*command, "--ray", cluster.address, "--gpus_per_worker", "1", load=Loader(Noted(log)))
    assert again.status == 1 and "error: --gpus_per_worker 1: the cluster has 0 GPUs; give 0 to do without\n" in again.err


def test_a_cluster_that_is_not_there(run: Run, sound: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="needs the extra [ray]")
    outcome = run("transcribe", sound, "-o", tmp_path / "out", "--ray", "127.0.0.1:1")
    assert outcome.status == 1
    assert (
        outcome.err.startswith("error: --ray 127.0.0.1:1: no Ray cluster can be used there (")
        and outcome.err.count("\n") == 1
    )
