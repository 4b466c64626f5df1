"""Live transcription: what decoding the buffer costs, how far behind the speaker its text is, what that costs in words.

    OMP_NUM_THREADS=1 python benchmarks/live.py measure       writes benchmarks/results/live.json
    python benchmarks/live.py report                          fills the tables of docs/live.md

The sound is that of long_recordings.py: held-out sentences in held-out voices with gaps between them. Nothing waits for a
clock: a microphone is acted whose time goes on with the sound, or with the processor time that the program has used, where
that is more. Processor time of one thread is what the program would take on a core of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from long_recordings import write_recording
from pages import RESULTS, ROOT, circumstances, fill, markdown, read_results, stated, write_results

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.audio.read import SAMPLE_RATE, Samples, load_audio
from diffusion_gemma_asr.audio.vad import Chunk, VadOptions, speech_chunks
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.evaluate.metrics import error_rate
from diffusion_gemma_asr.evaluate.normalise import NORMALISER
from diffusion_gemma_asr.transcribe.recordings import transcribe_chunk

DATA, PAGE = RESULTS / "live.json", ROOT / "docs/live.md"
MODEL = "mini"
MINUTES = 4.0
BUFFERS_S = (1.0, 2.0, 4.0, 8.0, 15.0)
REPEATS = 7
EVERY_S = (0.5, 1.0, 2.0)
BLOCK_S = 0.1


class ActedMicrophone:
    """Gives what a microphone would have recorded by now, at least one block.

    Attributes:
        behind: sound that waited when it was asked for, in seconds, at most.
    """

    def __init__(self, sound: Samples):
        self._sound, self._position, self._now, self._asked = sound, 0, 0.0, time.process_time()
        self.behind = 0.0

    def now(self) -> float:
        """Seconds since the recording began."""
        return self._now + time.process_time() - self._asked

    def blocks(self) -> Iterator[Samples]:
        """What there is to read, block by block."""
        while self._position < len(self._sound):
            now = self.now()
            self.behind = max(self.behind, now - self._position / SAMPLE_RATE)
            end = max(self._position + round(BLOCK_S * SAMPLE_RATE), round(now * SAMPLE_RATE))
            block, self._position = self._sound[self._position : end], end
            self._now, self._asked = max(now, end / SAMPLE_RATE), time.process_time()
            yield block


def decoding_ms(model: asr.Recognizer, speech: Samples, seconds: float) -> float:
    """Median processor time of decoding so much speech, with word times, over pieces of it."""
    options = asr.TranscribeOptions(DecodeOptions(language="en"), word_timestamps=True)
    size, took = round(seconds * SAMPLE_RATE), []
    for number in range(REPEATS):
        first = number * (len(speech) - size) // REPEATS
        chunk = Chunk(0.0, speech[first : first + size], 0.0, seconds, 1.0)
        start = time.process_time()
        transcribe_chunk(model.model, chunk, options)
        took.append(1000 * (time.process_time() - start))
    return float(np.median(took))


def stream(model: asr.Recognizer, sound: Samples, every: float) -> dict[str, Any]:
    """A recording as if it were spoken now: its words, when they were shown and committed, what it cost."""
    start, microphone = time.process_time(), ActedMicrophone(sound)
    updates: list[tuple[float, asr.LiveUpdate]] = []
    for update in model.live(microphone.blocks(), every=every, language="en"):
        updates.append((microphone.now(), update))
    committed = [at - word.end for at, update in updates for word in update.committed]
    words = [word for _, update in updates for word in update.committed]
    shown = [next(at for at, update in updates if update.heard >= word.end) - word.end for word in words]
    early = sum(len(update.committed) for _, update in updates if update.segment is None)
    return {
        "every_s": every,
        "text": "".join(word.word for word in words),
        "shown_s": [float(np.percentile(shown, share)) for share in (50, 95)],
        "committed_s": [float(np.percentile(committed, share)) for share in (50, 95)],
        "before_the_pause": early / len(words),
        "processor_share": (time.process_time() - start) / (len(sound) / SAMPLE_RATE),
        "behind_s": microphone.behind,
    }


def measure() -> None:
    """Measures everything and stores it."""
    model = asr.load(MODEL, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        script = write_recording(Path(folder) / "recording.wav", MINUTES)
        sound = load_audio(Path(folder) / "recording.wav")
    said = " ".join(spoken.line.text for spoken in script)
    speech = np.concatenate([chunk.samples for chunk in speech_chunks([sound], VadOptions())])
    decoding_ms(model, speech, 1.0)  # what is only done once
    start = time.process_time()
    batch = model.transcribe(sound, language="en")
    results: dict[str, Any] = {
        "model": MODEL,
        "normaliser": NORMALISER,
        "duration_s": len(sound) / SAMPLE_RATE,
        "batch": {
            "wer": error_rate([said], [batch.text], "en"),
            "processor_share": (time.process_time() - start) / (len(sound) / SAMPLE_RATE),
        },
        "decoding_ms": {str(seconds): decoding_ms(model, speech, seconds) for seconds in BUFFERS_S},
        "streams": [],
    }
    print(results, flush=True)
    for every in EVERY_S:
        row = stream(model, sound, every)
        text = row.pop("text")
        row |= {"wer": error_rate([said], [text], "en"), "differs_from_batch": error_rate([batch.text], [text], "en")}
        results["streams"].append(row)
        print(row, flush=True)
    write_results(DATA, results | {"circumstances": circumstances()})


def report() -> None:
    """Fills the tables."""
    results = read_results(DATA)
    costs, batch = results["decoding_ms"], results["batch"]
    decoding = markdown(
        ["speech in the buffer", *(f"{float(s):g} s" for s in costs)],
        [["decoding", *(f"{ms:.0f} ms" for ms in costs.values())]],
    )
    heading = [
        "`every`",
        "shown",
        "committed",
        "early",
        f"WER, {results['normaliser']}",
        "unlike batch",
        "of a core",
        "waiting",
    ]
    rows = [
        [
            f"{r['every_s']:g} s",
            f"{r['shown_s'][0]:.1f} / {r['shown_s'][1]:.1f} s",
            f"{r['committed_s'][0]:.1f} / {r['committed_s'][1]:.1f} s",
            f"{r['before_the_pause']:.0%}",
            f"{r['wer']:.1%}",
            f"{r['differs_from_batch']:.1%}",
            f"{r['processor_share']:.0%}",
            f"{r['behind_s']:.1f} s",
        ]
        for r in results["streams"]
    ]
    rows.append(["batch", "–", "–", "–", f"{batch['wer']:.1%}", "–", f"{batch['processor_share']:.0%}", "–"])
    where = (
        f"`{results['model']}`, {results['duration_s']:.0f} s of sound; processor time; {stated(results['circumstances'])}."
    )
    fill(PAGE, {"decoding": decoding, "streams": f"{markdown(heading, rows)}\n\n{where}"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure live transcription.")
    parser.add_argument("what", choices=("measure", "report"))
    {"measure": measure, "report": report}[parser.parse_args().what]()
