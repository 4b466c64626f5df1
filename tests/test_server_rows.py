"""server/rows.py: on a processor short recordings are stepped first, and long ones all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import clips, tiny_model

from diffusion_gemma_asr.audio.vad import Chunk
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.server.chunks import draft_chunks, encode_chunks
from diffusion_gemma_asr.server.requests import Request, Task, chunk_request
from diffusion_gemma_asr.server.rows import QUICK_S, QUICK_TURNS, Rows
from diffusion_gemma_asr.transcribe.recordings import TranscribeOptions

OPTIONS = TranscribeOptions(decode=DecodeOptions(language="en", start="noise", steps=30))


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder)


def drafted(model: DiffusionGemmaASR, seconds: float, *, read: int = 0, read_all: bool = True, place: int = 0) -> Task:
    """A chunk on the way to its rows, of a request of which so much was read."""
    samples = clips([round(16_000 * seconds)])[0]
    request: Request = chunk_request(Chunk(0.0, samples, 0.0, seconds, 1.0), OPTIONS, lambda event: None)
    request.read, request.read_all = read, read_all
    task = Task(request, place, request.waiting.popleft().chunk)
    ((batch,), _) = encode_chunks(model, [task])
    draft_chunks(model, batch, [task])
    return task


def stepped(rows: Rows, task: Task, quick: bool) -> bool:
    """Whether a step was one of the task's."""
    shown: list[int] = []
    task.request.on_step = lambda place, step, canvas: shown.append(step)
    list(rows.step(quick))
    task.request.on_step = None
    return bool(shown)


def test_short_recordings_are_stepped_alone_between_two_turns_of_all(model: DiffusionGemmaASR) -> None:
    rows = Rows(model)
    short, long = drafted(model, 1.0), drafted(model, QUICK_S + 1)
    rows.add([long])
    assert not rows.quick and not rows.quick_turn(coming=False)
    rows.add([short])
    assert rows.quick and len(rows) == 2
    turns = [rows.quick_turn(coming=False) for _ in range(2 * QUICK_TURNS + 2)]
    assert turns == 2 * [*[True] * QUICK_TURNS, False]
    assert not stepped(rows, long, quick=True) and stepped(rows, short, quick=True)
    assert stepped(rows, long, quick=False) and stepped(rows, short, quick=False)
    rows.keep([long])
    assert len(rows) == 1 and not rows.quick


@pytest.mark.parametrize(
    "seconds, read, read_all, place, quick",
    [
        (1.0, 2, True, 0, True),  # all of a recording
        (1.0, 1, False, 0, True),  # its first chunk: there may be more
        (1.0, 3, False, 0, False),  # of a long one
        (1.0, 3, True, 2, False),  # the end of one
        (QUICK_S + 0.5, 2, True, 0, False),
    ],
)
def test_what_is_short(model: DiffusionGemmaASR, seconds: float, read: int, read_all: bool, place: int, quick: bool) -> None:
    rows = Rows(model)
    rows.add([drafted(model, seconds, read=read, read_all=read_all, place=place)])
    assert rows.quick is quick and len(rows) == 1


def test_short_chunks_that_come_get_turns_but_not_all(model: DiffusionGemmaASR) -> None:
    rows = Rows(model)
    assert [rows.quick_turn(coming=True) for _ in range(QUICK_TURNS + 1)] == [*[True] * QUICK_TURNS, False]
    assert not rows.quick_turn(coming=False)
