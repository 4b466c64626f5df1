"""A model beside faster-whisper's tiny.en in int8, on the same sounds and cores: one short clip cold and warm, sixty clips.

    python benchmarks/peers.py measure MODEL --peer FOLDER     adds MODEL to benchmarks/results/peers.json
    python benchmarks/peers.py report                          fills the table of docs/performance.md

FOLDER holds the peer in CTranslate2's layout: OUT/ct2 of `python ../shared/tools/whisper_from_packages.py tiny.en OUT`. The
peer is no dependency: it is installed into a virtual environment of its own, runs/peers. The two are measured in turn, each
in processes of its own with two threads, ROUNDS times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pages import RESULTS, ROOT, circumstances, fill, markdown, read_results, stated, write_results

DATA, PAGE = RESULTS / "peers.json", ROOT / "docs/performance.md"
PEER_ENVIRONMENT = ROOT / "runs/peers"
PEER = "faster-whisper tiny.en, int8"
LIST, CORPUS = ROOT / "../shared/speech/en-dev.jsonl", "librispeech-dev-clean"
COUNT, SHORT_S, WARM, ROUNDS, THREADS = 60, 3.0, 9, 3, 2

OURS = """
import json, sys, time
task = json.loads(sys.argv[1])
began = time.perf_counter()
import diffusion_gemma_asr as asr
model = asr.load(task["model"], **task["options"])
one = lambda: model.transcribe(task["short"], language="en").text
many = lambda: [transcript.text for transcript in model.transcribe_many(task["many"], language="en")]
"""
THEIRS = """
import json, sys, time
task = json.loads(sys.argv[1])
began = time.perf_counter()
from faster_whisper import WhisperModel
model = WhisperModel(task["model"], device="cpu", compute_type="int8", cpu_threads=task["threads"])
read = lambda path: " ".join(segment.text for segment in model.transcribe(path, language="en", beam_size=task["beam"])[0])
one = lambda: read(task["short"])
many = lambda: [read(path) for path in task["many"]]
"""
BOTH = """
def timed(work):
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began
first = one()
found = {"cold_s": time.perf_counter() - began, "short_text": first}
if task["warm"]:
    found["warm_s"] = [timed(one)[1] for _ in range(task["warm"])]
    found["texts"], found["many_s"] = timed(many)
print(json.dumps(found))
"""


def run(python: Path, code: str, task: dict[str, Any]) -> dict[str, Any]:
    """One process: what it measured, and its seconds from start to end."""
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    began = time.perf_counter()
    process = subprocess.run(
        [str(python), "-c", code + BOTH, json.dumps(task)], capture_output=True, text=True, env=environment, check=False
    )
    wall = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(process.stderr)
    return json.loads(process.stdout.splitlines()[-1]) | {"wall_s": wall}


def peer_python() -> Path:
    """The interpreter of an environment that has the peer."""
    python = PEER_ENVIRONMENT / "bin/python"
    if not python.exists():
        venv.create(PEER_ENVIRONMENT, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "faster-whisper"], check=True)
    return python


def measure(name: str, encoder: Path | None, peer: Path, count: int, rounds: int) -> None:
    """Adds a model to the data file, the peer beside it."""
    from diffusion_gemma_asr.data.manifest import read_manifest  # what `report` does not need
    from diffusion_gemma_asr.evaluate.metrics import error_rate
    from diffusion_gemma_asr.evaluate.normalise import NORMALISER

    rows = [u for u in read_manifest(LIST, ["en"], skipped=[]) if Path(u.audio_filepath).parents[1].name == CORPUS]
    short = min(rows, key=lambda u: abs(u.duration - SHORT_S))
    rows = rows[:count]
    sounds = {"short": short.audio_filepath, "many": [u.audio_filepath for u in rows], "threads": THREADS}
    options = {} if encoder is None else {"encoder": str(encoder)}
    own = Path(sys.executable), OURS, {"model": name, "options": options}
    systems: dict[str, tuple[Path, str, dict[str, Any]]] = {name: own}
    for beam in (5, 1):
        systems[f"{PEER}, beam {beam}"] = (peer_python(), THEIRS, {"model": str(peer), "beam": beam})
    cold: dict[str, list[float]] = {title: [] for title in systems}
    warm: dict[str, list[float]] = {title: [] for title in systems}
    many: dict[str, list[float]] = {title: [] for title in systems}
    texts: dict[str, list[str]] = {}
    for _ in range(rounds):
        for title, (python, code, task) in systems.items():
            cold[title].append(run(python, code, sounds | task | {"warm": 0})["wall_s"])
        for title, (python, code, task) in systems.items():
            found = run(python, code, sounds | task | {"warm": WARM})
            warm[title].append(statistics.median(found["warm_s"]))
            many[title].append(found["many_s"])
            texts[title] = found["texts"]
            seconds = f"cold {cold[title][-1]:.2f}, warm {warm[title][-1]:.2f}, {count} clips {found['many_s']:.1f}"
            print(f"{title}, s: {seconds}", flush=True)
    references = [u.text for u in rows]
    found = {
        title: {
            "cold_s": statistics.median(cold[title]),
            "warm_s": statistics.median(warm[title]),
            "many_s": statistics.median(many[title]),
            "wer": error_rate(references, texts[title], "en"),
        }
        for title in systems
    }
    shape = {"short_s": short.duration, "many_s": sum(u.duration for u in rows), "count": len(rows), "rounds": rounds}
    content = read_results(DATA)
    content[name] = shape | {"systems": found, "normaliser": NORMALISER, "circumstances": circumstances()}
    write_results(DATA, content)


def report() -> None:
    """Fills the table of the page."""
    rows, notes = [], []
    for name, entry in read_results(DATA).items():
        for title, figures in entry["systems"].items():
            speed = entry["many_s"] / figures["many_s"]
            seconds = [f"{figures['cold_s']:.2f}", f"{figures['warm_s']:.2f}"]
            rows.append([title, *seconds, f"{speed:.0f}", f"{100 * figures['wer']:.1f}%"])
        clips = f"{entry['count']} clips, {entry['many_s']:.0f} s of sound"
        shape = f"a clip of {entry['short_s']:.1f} s; {clips}; medians of {entry['rounds']}"
        notes.append(f"`{name}`: {shape}; {stated(entry['circumstances'])}.")
    heading = ["", "one short clip, s, cold", "warm", f"{COUNT} clips, × real time", "WER"]
    fill(PAGE, {"peers": markdown(heading, rows) + "\n\n" + "\n".join(notes)})


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("model")
    measuring.add_argument("--encoder", type=Path, help="folder of the model's encoder, where it is not in the package")
    measuring.add_argument("--peer", type=Path, required=True)
    measuring.add_argument("--count", type=int, default=COUNT)
    measuring.add_argument("--rounds", type=int, default=ROUNDS)
    commands.add_parser("report")
    options = parser.parse_args(arguments)
    if options.command == "report":
        report()
    else:
        measure(options.model, options.encoder, options.peer, options.count, options.rounds)


if __name__ == "__main__":
    main()
