"""Two people on two channels are told from one scene in stereo, whatever happened to it on the way."""

from __future__ import annotations

import io
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from sounds import tone, write

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.app.jobs import Job
from diffusion_gemma_asr.app.partial import Partial, rest
from diffusion_gemma_asr.audio.read import SAMPLE_RATE, load_audio, read_channels
from diffusion_gemma_asr.audio.vad import Chunk, speech_chunks
from diffusion_gemma_asr.audio.voices import different_speech, held_apart
from diffusion_gemma_asr.errors import AudioError
from diffusion_gemma_asr.transcribe.recordings import TranscribeOptions, recording_events
from diffusion_gemma_asr.transcribe.results import Segment

EXAMPLES = Path(__file__).parents[1] / "examples"
Sound = np.ndarray
VOICE = {code: load_audio(EXAMPLES / f"{code}.flac") for code in ("en", "de", "fr", "es", "hi", "zh")}
SECONDS = 12.0


def spoken(*codes: str, seconds: float = SECONDS, start_s: float = 0.2) -> Sound:
    """Sentences one behind the other, and silence up to the end."""
    sound = np.concatenate([np.zeros(round(start_s * SAMPLE_RATE), np.float32), *(VOICE[code] for code in codes)])
    count = round(seconds * SAMPLE_RATE)
    return np.pad(sound, (0, max(0, count - len(sound))))[:count]


ANN, BOB = spoken("en", "de", "hi"), spoken("fr", "zh", "es", start_s=0.9)


def noise(level: float, seed: int, like: Sound = ANN) -> Sound:
    """White noise, so many times as loud as a sound."""
    return (level * like.std() * np.random.default_rng(seed).standard_normal(len(like))).astype(np.float32)


def later(sound: Sound, seconds: float) -> Sound:
    return np.concatenate([np.zeros(round(seconds * SAMPLE_RATE), np.float32), sound])[: len(sound)]


def room(sound: Sound, seed: int, rt_s: float = 0.6, direct: float = 0.5) -> Sound:
    """As a microphone hears it in a room whose echoes last for `rt_s`, beside `direct` times as loud direct sound."""
    count = round(rt_s * SAMPLE_RATE)
    echo = np.random.default_rng(seed).standard_normal(count) * 10.0 ** (-3 * np.arange(count) / count)
    echo /= np.sqrt(np.square(echo).sum())
    echo[0] = direct
    size = len(sound) + count
    return np.fft.irfft(np.fft.rfft(sound, size) * np.fft.rfft(echo, size), size)[: len(sound)].astype(np.float32)


def music(seed: int) -> Sound:
    """Chords, four a second, with decaying notes."""
    random, parts = np.random.default_rng(seed), []
    for _ in range(round(4 * SECONDS)):
        notes = sum(tone(110 * 2 ** (n / 12), 0.25, amplitude=0.05) for n in random.integers(0, 36, 4))
        parts.append(notes * np.exp(-6 * np.arange(len(notes)) / SAMPLE_RATE))
    return np.concatenate(parts).astype(np.float32)


def coded(folder: Path, sound: Sound, name: str) -> Sound:
    return np.pad(load_audio(write(folder / name, sound, 48_000 if name.endswith("ogg") else 16_000)), (0, 4000))


SCENES: dict[str, Callable[[], tuple[Sound, Sound]]] = {
    "mono in two channels": lambda: (ANN, ANN),
    "one inverted": lambda: (ANN, -ANN),
    "one silent": lambda: (ANN, 0 * ANN),
    "both silent": lambda: (0 * ANN, 0 * ANN),
    "one with noise alone": lambda: (ANN, noise(0.1, 1)),
    "one with a hum": lambda: (ANN, tone(50, SECONDS, amplitude=0.1)),
    "one far softer": lambda: (ANN, 0.01 * ANN + noise(0.0003, 1)),
    "loud noise in both": lambda: (ANN + noise(0.5, 1), 0.3 * (ANN + noise(0.5, 2))),
    "spaced microphones": lambda: (ANN, 0.6 * later(ANN, 0.01)),
    "inverted and late": lambda: (ANN, -0.6 * later(ANN, 0.003)),
    "an echo": lambda: (ANN, 0.4 * later(ANN, 0.3)),
    "a long way": lambda: (ANN, 0.4 * later(ANN, 0.9)),
    "a room": lambda: (room(ANN, 1), room(ANN, 2)),
    "a church": lambda: (room(ANN, 1, 2.5, 0.3), later(room(ANN, 2, 2.5, 0.3), 0.02)),
    "near and far": lambda: (ANN, later(room(ANN, 3, 1.0, 0.2), 0.02)),
    "filtered": lambda: (ANN, np.convolve(ANN, np.ones(8) / 8, "same").astype(np.float32)),
    "two people in a room": lambda: (
        room(ANN, 1) + 0.5 * later(room(BOB, 2), 0.004),
        0.5 * later(room(ANN, 3), 0.004) + room(BOB, 4),
    ),
    "two people panned": lambda: (0.9 * ANN + 0.4 * BOB, 0.4 * ANN + 0.9 * BOB),
    "a microphone for each of two, who hear both": lambda: (ANN + 0.25 * later(BOB, 0.004), BOB + 0.25 * later(ANN, 0.004)),
    "they take turns, and are heard in both": lambda: (
        spoken("en") + 0.1 * later(spoken("fr", start_s=4.0), 0.004) + noise(0.001, 1),
        spoken("fr", start_s=4.0) + 0.1 * later(spoken("en"), 0.004) + noise(0.001, 2),
    ),
    "music left, a voice right": lambda: (music(1), ANN),
    "music panned, a voice in the middle": lambda: (ANN + music(1), ANN + 0.5 * music(2)),
    "music in stereo": lambda: (music(1) + 0.5 * music(2), music(2) + 0.3 * music(1)),
    "a word in one channel, long speech in the other": lambda: (
        ANN,
        later(spoken("fr"), 0.5) * (np.arange(len(ANN)) < 20_000),
    ),
}


@pytest.mark.parametrize("scene", SCENES)
def test_one_scene_stays_one(scene: str) -> None:
    one, other = SCENES[scene]()
    for pair in ((one, other), (other, one), (one[: 5 * SAMPLE_RATE], other[: 5 * SAMPLE_RATE])):
        assert not different_speech(np.stack(pair))


@pytest.mark.parametrize("names", [("low.mp3", "a.ogg"), ("a.m4a", "low.mp3"), ("a.ogg", "a.m4a")])
def test_one_voice_through_two_codecs_stays_one(tmp_path: Path, names: tuple[str, str]) -> None:
    one, other = (coded(tmp_path, ANN, name) for name in names)
    count = min(len(one), len(other))
    assert not different_speech(np.stack([one[:count], other[:count]]))


TWO: dict[str, Callable[[], tuple[Sound, Sound]]] = {
    "at once": lambda: (ANN, BOB),
    "one softer": lambda: (ANN, 0.03 * BOB),
    "one inverted": lambda: (ANN, -BOB),
    "on noisy lines": lambda: (ANN + noise(0.1, 1), BOB + noise(0.1, 2)),
    "with a hum in both": lambda: (ANN + tone(50, SECONDS, amplitude=0.02), BOB + tone(50, SECONDS, amplitude=0.02)),
    "heard a little in each other's": lambda: (ANN + 0.001 * BOB, BOB + 0.001 * ANN),
    "in turn": lambda: (spoken("en", "de"), later(spoken("fr", "zh"), 5.3)),
}


@pytest.mark.parametrize("how", TWO)
def test_two_people_are_two(how: str) -> None:
    one, other = TWO[how]()
    assert different_speech(np.stack([one, other])) and different_speech(np.stack([other, one]))


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(VOICE, 2))[::3])
def test_a_sentence_each_is_enough(one: str, other: str) -> None:
    assert different_speech(np.stack([spoken(one, seconds=4.5), spoken(other, seconds=4.5)]))


def blocks(sound: Sound, seconds: float = 1.0) -> Iterator[Sound]:
    size = round(seconds * SAMPLE_RATE)
    for first in range(0, sound.shape[-1], size):
        yield sound[..., first : first + size]


def test_nothing_is_lost_and_little_is_held() -> None:
    taken = 0

    def counted(sound: Sound) -> Iterator[Sound]:
        nonlocal taken
        for block in blocks(sound):
            taken += 1
            yield block

    call = np.stack([ANN, BOB])
    for sound, expected, most in (
        (np.pad(np.tile(call, 4), ((0, 0), (50 * SAMPLE_RATE, 0))), True, 98),  # silence comes first
        (np.tile(call, 4), True, 48),
        (np.tile(np.stack([ANN, ANN]), 4), False, 48),
        (np.zeros((2, 300 * SAMPLE_RATE), np.float32), False, 120),
        (np.tile(ANN[None], 4), False, 1),
        (call[:, :8000], False, 1),
    ):
        taken = 0
        apart, rest_of_it = held_apart(counted(sound))
        assert apart == expected and taken <= most
        np.testing.assert_array_equal(np.concatenate(list(rest_of_it), axis=1), sound)
    assert held_apart(iter([]))[0] is False


def chunks_of(source: object, channel: str = "auto", **options: object) -> list[Chunk]:
    events = [event for event, _ in recording_events(source, TranscribeOptions(channel=channel, **options))]
    assert not isinstance(events[-1], AudioError), events[-1]
    return events[:-1]


def alike(one: list[Chunk], other: list[Chunk]) -> bool:
    return [c.channel for c in one] == [c.channel for c in other] and all(
        (a.start, a.end, a.offset) == (b.start, b.end, b.offset) and np.allclose(a.samples, b.samples, atol=1e-5)
        for a, b in zip(one, other, strict=True)
    )


def test_auto_is_each_for_two_people_and_mix_for_all_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    call = write(tmp_path / "call.wav", np.stack([ANN, BOB]))
    each = chunks_of(call, "each")
    assert {chunk.channel for chunk in each} == {0, 1} and not caplog.text
    assert alike(chunks_of(call), each)
    assert caplog.messages == [
        f"{call}: the two channels hold different speech and are transcribed one by one; --channel mix mixes them"
    ]
    for channel, sound in ((0, ANN), (1, BOB)):
        own = [chunk for chunk in chunks_of(sound)]
        assert [c.start for c in each if c.channel == channel] == pytest.approx([c.start for c in own], abs=0.05)
    caplog.clear()
    for sound in (np.stack([ANN, 0.5 * later(ANN, 0.01)]), np.stack([ANN, -ANN]), ANN, np.stack([ANN, BOB, ANN])):
        assert alike(chunks_of(sound), chunks_of(sound, "mix"))
    assert {chunk.channel for chunk in chunks_of(call, "mix")} == {None} and not caplog.text


def test_a_pipe_is_read_once_and_gives_the_same(tmp_path: Path) -> None:
    call = write(tmp_path / "call.flac", np.stack([ANN, BOB]))
    reading, writing = os.pipe()

    def send() -> None:
        with open(writing, "wb") as file:
            file.write(call.read_bytes())

    threading.Thread(target=send, daemon=True).start()
    with open(reading, "rb") as pipe:
        assert alike(chunks_of(pipe), chunks_of(call, "each"))
    assert alike(chunks_of(io.BytesIO(call.read_bytes()), "each"), chunks_of(call, "each"))


def test_chunks_of_all_channels_come_in_order_of_time() -> None:
    long = np.stack([np.tile(ANN, 3), np.tile(np.roll(BOB, 30_000), 3), np.tile(0.001 * ANN, 3)])
    starts = [chunk.start for chunk in chunks_of(long, "each")]
    assert starts == sorted(starts) and len(starts) > 5
    parts = {"clip_timestamps": (3.0, 9.0, 20.0, 31.0)}
    found = chunks_of(long, "each", **parts)
    for channel in range(3):
        alone = list(speech_chunks(blocks(long[channel]), clips=((3.0, 9.0), (20.0, 31.0))))
        assert alike([c for c in found if c.channel == channel], [of_channel(c, channel) for c in alone])


def of_channel(chunk: Chunk, channel: int) -> Chunk:
    return Chunk(chunk.offset, chunk.samples, chunk.start, chunk.end, chunk.speech_prob, channel)


def test_what_is_decided_does_not_depend_on_the_parts_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    late = np.concatenate([np.stack([ANN, BOB]), np.stack([ANN, 0 * ANN])], axis=1)
    assert {chunk.channel for chunk in chunks_of(late, clip_timestamps=(SECONDS,))} == {0}
    assert "different speech" in caplog.text


def segment(number: int, start: float, end: float, channel: int | None) -> Segment:
    return Segment(number, start, end, f"text {number}", (), 0.0, 0.0, 1.0, channel=channel)


@pytest.mark.parametrize(
    ("spans", "kept", "from_s"),
    [
        ([(0, 5, 0), (1, 3, 1), (6, 9, 0)], 2, 5.0),
        ([(0, 5, 0), (1, 3, 1), (4, 9, 1)], 0, None),  # everything is connected
        ([(0, 5, 0), (6, 30, 1), (7, 9, 0), (10, 12, 0)], 1, 5.0),
        ([(0, 5, 0)], 0, None),  # on the other channel something may have begun meanwhile
        ([(0, 5, None), (6, 9, None)], 2, 9.0),
    ],
)
def test_an_interrupted_run_goes_on_where_no_channel_is_cut(
    spans: list[tuple[float, float, int | None]], kept: int, from_s: float | None
) -> None:
    segments = [segment(number, *span) for number, span in enumerate(spans)]
    options, stay = rest(TranscribeOptions(), segments)
    assert stay == segments[:kept]
    assert options.clip_timestamps == (() if from_s is None else (from_s,))


def test_segments_that_did_not_stay_do_not_come_back(tmp_path: Path) -> None:
    recording, output = write(tmp_path / "call.wav", ANN), tmp_path / "call.txt"

    def partial() -> Partial:
        return Partial(output, recording, TranscribeOptions(), "mini")

    first = partial()
    for number, span in enumerate([(0, 5, 0), (6, 30, 1), (7, 9, 0)]):
        first.add(segment(number, *span))
    job = Job(recording, {"txt": output}, TranscribeOptions())
    job.continue_from(partial())
    assert [s.text for s in job.segments] == ["text 0"] and job.done_s == 5
    job.add(segment(0, 6, 8, 1))
    assert partial().read() == job.segments


def test_both_are_understood(caplog: pytest.LogCaptureFixture) -> None:
    call = np.stack([spoken("en", seconds=4.5), spoken("de", seconds=4.5)])
    model = asr.load("mini", device="cpu")
    transcript = model.transcribe(call)
    assert "different speech" in caplog.text
    assert "follow the river" in " ".join(s.text for s in transcript.segments if s.channel == 0)
    assert "follow the river" not in model.transcribe(call, channel="mix").text
    assert [s["channel"] for s in transcript.to_dict()["segments"]] == [s.channel for s in transcript.segments]
    assert transcript.duration == pytest.approx(4.5)


def test_reading_side_by_side_refuses_what_reading_refuses() -> None:
    with pytest.raises(AudioError, match=r"NaN or infinite at 0\.500 s"):
        list(read_channels(np.where(np.arange(SAMPLE_RATE) == 8000, np.nan, np.stack([ANN, BOB])[:, :SAMPLE_RATE])))
    with pytest.raises(AudioError, match="no track 1"):
        list(read_channels(ANN, track=1))


def test_what_comes_before_an_error_is_heard() -> None:
    call = np.stack([ANN, BOB])

    def broken() -> Iterator[Sound]:
        yield from blocks(call)
        raise AudioError("cut short")

    apart, rest_of_it = held_apart(broken())
    assert apart
    np.testing.assert_array_equal(np.concatenate(list(itertools.islice(rest_of_it, round(SECONDS))), axis=1), call)
    with pytest.raises(AudioError, match="cut short"):
        next(rest_of_it)
