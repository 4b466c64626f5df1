"""Long recordings with a known script: error rate, segment starts, memory and speed; and word times on glued words.

    python benchmarks/long_recordings.py measure               writes benchmarks/results/long_recordings.json
    python benchmarks/long_recordings.py memory                measures memory alone, and adds it
    python benchmarks/long_recordings.py report                fills the tables of docs/long_recordings.md

A recording is made of held-out sentences (recipes/lists/heldout-en.txt) that espeak-ng says in held-out voices, each as
`data.synthetic.synth.render` makes it, with gaps of 0.7 to 3 s of silence, faint hiss or louder coloured noise between them.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
import wave
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from pages import RESULTS, ROOT, circumstances, fill, markdown, read_results, stated, write_results

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.audio.read import SAMPLE_RATE, Samples
from diffusion_gemma_asr.data.synthetic.espeak import speak
from diffusion_gemma_asr.data.synthetic.synth import HELD_OUT_VARIANTS, Line, plan, render, render_with_phonemes
from diffusion_gemma_asr.data.text import plain_english
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.evaluate.metrics import error_rate
from diffusion_gemma_asr.evaluate.normalise import NORMALISER

DATA, PAGE = RESULTS / "long_recordings.json", ROOT / "docs/long_recordings.md"
SENTENCES = ROOT / "recipes/lists/heldout-en.txt"
MODEL = "mini"
MINUTES = (10.0, 60.0)
GAPS_S = (0.7, 3.0)  # after the pause that each utterance has of its own
WORDS, GLUED = 6, 200  # in a glued utterance; utterances


@dataclass(frozen=True)
class Spoken:
    """A sentence of a recording, and when it is said, in seconds."""

    line: Line
    start: float
    end: float


def lines(seed: int) -> Iterator[Line]:
    """The held-out sentences in held-out voices, again and again, never twice in the same way."""
    sentences = SENTENCES.read_text(encoding="utf-8").split("\n")
    while True:
        yield from plan([plain_english(s) for s in sentences if s.strip()], "en", HELD_OUT_VARIANTS, seed)
        seed += 1


def write_recording(path: Path, minutes: float, seed: int = 11) -> list[Spoken]:
    """Writes a WAV file of at least so many minutes, and says what is said in it, and when."""
    rng = np.random.default_rng(seed)
    script, position = [], 0
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)

        def write(samples: Samples) -> None:
            nonlocal position
            file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
            position += len(samples)

        for line in lines(seed):
            write(_gap(rng))
            samples, phonemes = render_with_phonemes(line)
            spoken = [(start, end) for symbol, start, end in phonemes if not symbol.startswith("_")]
            at = position / SAMPLE_RATE
            script.append(Spoken(line, at + spoken[0][0], at + spoken[-1][1]))
            write(samples)
            if position >= 60 * minutes * SAMPLE_RATE:
                return script
    raise AssertionError("lines() does not end")


def _gap(rng: np.random.Generator) -> Samples:
    """Silence, hiss or coloured noise."""
    n = round(rng.uniform(*GAPS_S) * SAMPLE_RATE)
    amplitude, exponent = [(0.0, 0.0), (0.001, 0.0), (0.02, rng.uniform(0, 1))][rng.integers(3)]
    spectrum = np.fft.rfft(rng.standard_normal(n)) / np.maximum(np.arange(n // 2 + 1), 1) ** exponent
    noise = np.fft.irfft(spectrum, n)
    return (amplitude * noise / max(float(noise.std()), 1e-9)).astype(np.float32)


def compare(script: Sequence[Spoken], alone: Sequence[str], transcript: asr.Transcript) -> dict[str, Any]:
    """Error rates of the single utterances and of the recording, and how far segments start from what is said."""
    said = [spoken.line.text for spoken in script]
    starts = np.array([spoken.start for spoken in script])
    off = [float(np.min(np.abs(starts - segment.start))) for segment in transcript.segments]
    return {
        "utterances": len(said),
        "segments": len(transcript.segments),
        "duration_s": round(transcript.duration, 1),
        "wer_alone": error_rate([" ".join(said)], [" ".join(alone)], "en"),
        "wer": error_rate([" ".join(said)], [transcript.text], "en"),
        "start_error_s": {
            "median": float(np.median(off)),
            "largest": max(off),
            "within_0.3": sum(error <= 0.3 for error in off) / len(off),
        },
    }


def read_alone(model: asr.Recognizer, script: Sequence[Spoken]) -> list[str]:
    """What the model writes for each utterance by itself, without voice activity detection."""
    clips = [render(spoken.line) for spoken in script]
    return [row.text for row in decode_clips(model.model, clips, DecodeOptions(language="en"))]


def measure_recording(model: asr.Recognizer, path: Path, minutes: float) -> dict[str, Any]:
    """Makes a recording and transcribes it, in this process for the text, in one of its own for its memory."""
    script = write_recording(path, minutes)
    alone = read_alone(model, script)
    start = time.perf_counter()
    transcript = model.transcribe(path, language="en")
    took_s = time.perf_counter() - start
    figures = compare(script, alone, transcript)
    return figures | {"minutes": minutes, "rtfx": transcript.duration / took_s, "peak_memory_mb": peak_memory_mb(path)}


def peak_memory_mb(path: Path) -> float:
    """Most resident memory of a process that transcribes a file on the command line, in MB (Linux).

    The process says it itself: what its parent is told of it counts the parent's own memory from before it began.
    """
    code = (
        "import sys, diffusion_gemma_asr.app.cli as cli\n"
        "try:\n    cli.main(sys.argv[1:])\n"
        "finally:\n    print(open('/proc/self/status').read(), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "transcribe", str(path), "--model", MODEL, "--language", "en", "--device", "cpu"]
    said = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True).stderr
    return int(re.findall(r"VmHWM:\s+(\d+) kB", said)[0]) * 1024 / 1e6


def glued(count: int, seed: int = 1) -> Iterator[tuple[Samples, list[asr.Word]]]:
    """Recordings of single words, each said by itself, with gaps of 50 to 400 ms, and when each is said."""
    rng = random.Random(seed)
    counts = Counter(SENTENCES.read_text(encoding="utf-8").lower().split())
    vocabulary = sorted(word for word, n in counts.items() if n > 2 and len(word) > 2 and word.isalpha())
    for number in range(count):
        voice = f"en-us+{rng.choice(HELD_OUT_VARIANTS)}"
        parts, said = [np.zeros(round(rng.uniform(0.3, 0.8) * SAMPLE_RATE), np.float32)], []
        at = len(parts[0])
        for word in rng.sample(vocabulary, WORDS):
            samples = _word(word, voice, rng)
            said.append(asr.Word(word, at / SAMPLE_RATE, (at + len(samples)) / SAMPLE_RATE, 1.0))
            parts += [samples, np.zeros(round(rng.uniform(0.05, 0.4) * SAMPLE_RATE), np.float32)]
            at += sum(map(len, parts[-2:]))
        whole = np.concatenate([*parts, np.zeros(SAMPLE_RATE // 2, np.float32)])
        hiss = 0.0005 * np.random.default_rng(number).standard_normal(len(whole))
        yield (whole + hiss).astype(np.float32), said


def _word(word: str, voice: str, rng: random.Random) -> Samples:
    """A word without the silence around it: from the first to the last sample of over a hundredth of its peak."""
    speech = speak(word, voice, rng.randint(130, 180), rng.randint(35, 65))
    samples = soxr.resample(speech.samples.astype(np.float32) / 32768, speech.sample_rate, SAMPLE_RATE)
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    samples = samples[loud[0] : loud[-1] + 1]
    return 0.3 * samples / np.abs(samples).max()


def word_errors(model: asr.Recognizer, count: int) -> dict[str, list[float]]:
    """Distance in seconds of the starts and ends of words from the true ones, by the words they belong to.

    Returns:
        script: of all words, the true text being aligned with the sound; transcript: of those that the model recognised.
        A word counts as recognised where it stands once in the transcript; it may still stand there for another one.
    """
    errors: dict[str, list[float]] = {"script": [], "transcript": []}
    for samples, said in glued(count):
        segments = model.transcribe(samples, language="en", word_timestamps=True).segments
        timed = {"script": list(model.align(samples, " ".join(word.word for word in said)))}
        timed["transcript"] = [word for segment in segments for word in segment.words or ()]
        for kind, words in timed.items():
            texts = [word.word.strip() for word in words]
            for true in said:
                if texts.count(true.word) == 1:
                    word = words[texts.index(true.word)]
                    errors[kind] += [abs(word.start - true.start), abs(word.end - true.end)]
    return errors


def measure() -> None:
    """Measures everything and stores it."""
    model = asr.load(MODEL, device="cpu")
    results: dict[str, Any] = {"model": MODEL, "normaliser": NORMALISER, "recordings": []}
    with tempfile.TemporaryDirectory() as folder:
        for minutes in MINUTES:
            results["recordings"].append(measure_recording(model, Path(folder) / "recording.wav", minutes))
            print(results["recordings"][-1], flush=True)
    results["words"] = {
        kind: {
            "words": len(errors) // 2,
            "median_s": float(np.median(errors)),
            "p95_s": float(np.percentile(errors, 95)),
            "within_250_ms": float(np.mean(np.array(errors) <= 0.25)),
        }
        for kind, errors in word_errors(model, GLUED).items()
    }
    print(results["words"])
    write_results(DATA, read_results(DATA) | results | {"circumstances": circumstances()})


def measure_memory() -> None:
    """Measures the memory that the command takes, and adds it to what is stored."""
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording.wav"
        for minutes in MINUTES:
            write_recording(path, minutes)
            taken.append({"minutes": minutes, "peak_memory_mb": peak_memory_mb(path)})
            print(taken[-1], flush=True)
    write_results(DATA, read_results(DATA) | {"memory": {"recordings": taken, "circumstances": circumstances()}})


def memory_table(memory: dict[str, Any]) -> str:
    """The memory that the command takes for each recording."""
    rows = [[f"{r['minutes']:.0f} min", f"{r['peak_memory_mb']:.0f} MB"] for r in memory["recordings"]]
    heading = ["recording", "memory"]
    return f"{markdown(heading, rows)}\n\n`{MODEL}`, {stated(memory['circumstances'])}."


def report() -> None:
    """Fills the tables."""
    results = read_results(DATA)
    heading = ["recording", "utterances", "segments", f"WER of each alone, {results['normaliser']}", "WER"]
    heading += ["start off, median / most", "by at most 0.3 s", "RTFx", "memory"]
    rows = []
    for r in results["recordings"]:
        off = r["start_error_s"]
        cells = [
            f"{r['minutes']:.0f} min",
            str(r["utterances"]),
            str(r["segments"]),
            f"{r['wer_alone']:.1%}",
            f"{r['wer']:.1%}",
        ]
        cells += [f"{off['median']:.2f} / {off['largest']:.2f} s", f"{off['within_0.3']:.1%}", f"{r['rtfx']:.0f}"]
        rows.append([*cells, f"{r['peak_memory_mb']:.0f} MB"])
    growth = results["recordings"][-1]["peak_memory_mb"] - results["recordings"][0]["peak_memory_mb"]
    names = {"script": "the true text, aligned", "transcript": "what the model wrote"}
    words = []
    for kind, w in results["words"].items():
        times = [f"{1000 * w['median_s']:.0f} ms", f"{1000 * w['p95_s']:.0f} ms", f"{w['within_250_ms']:.1%}"]
        words.append([names[kind], f"{w['words']} of {GLUED * WORDS}", *times])
    where = f"Memory grows by {growth:.0f} MB. `{results['model']}`, {stated(results['circumstances'])}."
    word_heading = ["words of", "words", "median", "95th percentile", "at most 250 ms off"]
    tables = {"recordings": f"{markdown(heading, rows)}\n\n{where}", "words": markdown(word_heading, words)}
    if "memory" in results:
        tables["memory"] = memory_table(results["memory"])
    fill(PAGE, tables)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure long recordings.")
    parser.add_argument("what", choices=("measure", "memory", "report"))
    {"measure": measure, "memory": measure_memory, "report": report}[parser.parse_args().what]()
