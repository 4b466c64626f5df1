"""The server as its clients see it: OpenAI's package and plain HTTP."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_runs import (  # noqa: F401  fixtures; it skips where an extra is absent
    EXAMPLE,
    TEXT,
    LiveServer,
    client,
    connection,
    form,
    header,
    httpx,
    minutes,
    model,
    openai,
    server,
    serving,
    speech,
    srt,
    until,
    webvtt,
)
from sounds import write, write_wav
from tiny_model import tiny_model

from diffusion_gemma_asr.audio.read import Samples
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.server.settings import ServerSettings

# -- OpenAI's package --------------------------------------------------------------------------------------------------


def test_the_package_gets_every_form(client: Any) -> None:
    create = client.audio.transcriptions.create
    plain = create(model="mini", file=EXAMPLE)
    assert (
        plain.text.startswith(TEXT)
        and plain.usage.type == "duration"
        and plain.usage.seconds == pytest.approx(3.0, abs=0.01)
    )
    assert [language.code for language in plain.languages] == ["en"] and plain.logprobs is None
    assert create(model="whisper-1", file=EXAMPLE, response_format="text") == plain.text + "\n"
    verbose = create(model="mini", file=EXAMPLE, response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert (verbose.text, verbose.language) == (plain.text, "english") and isinstance(verbose.duration, float)
    assert [word.word for word in verbose.words] == plain.text.split()
    assert all(a.end <= b.start for a, b in zip(verbose.words, verbose.words[1:], strict=False))
    (segment,) = verbose.segments
    assert segment.text == plain.text and segment.tokens and segment.start < segment.end <= verbose.duration
    assert create(model="mini", file=EXAMPLE, response_format="verbose_json").words is None


def test_subtitles_are_read_back_by_their_libraries(client: Any) -> None:
    create = client.audio.transcriptions.create
    cues = list(srt.parse(create(model="mini", file=EXAMPLE, response_format="srt")))
    others = webvtt.from_buffer(io.StringIO(create(model="mini", file=EXAMPLE, response_format="vtt")))
    assert cues and " ".join(" ".join(cue.content.split()) for cue in cues).startswith(TEXT)
    assert [cue.content for cue in cues] == [caption.text for caption in others]


def test_the_package_streams(client: Any, speech: Samples) -> None:
    sound = io.BytesIO(write_wav(np.concatenate([speech, np.zeros(16_000, np.float32), speech])))
    sound.name = "twice.wav"
    whole = client.audio.transcriptions.create(model="mini", file=sound).text
    sound.seek(0)
    events = list(client.audio.transcriptions.create(model="mini", file=sound, stream=True))
    assert [event.type for event in events] == [*["transcript.text.delta"] * (len(events) - 1), "transcript.text.done"]
    assert len(events) >= 3 and "".join(event.delta for event in events[:-1]) == events[-1].text == whole
    assert events[-1].usage.seconds == pytest.approx(7.0, abs=0.05)


def test_canvases_come_only_where_they_are_asked_for(client: Any) -> None:
    how: dict[str, Any] = {"model": "mini", "file": EXAMPLE, "stream": True}
    extra = {"steps": 2, "start": "noise", "seed": 1}
    asked = [event.type for event in client.audio.transcriptions.create(**how, extra_body={**extra, "include": ["canvas"]})]
    assert asked.count("canvas.step") == 4 and asked[-1] == "transcript.text.done"  # the draft, the noise, two steps
    not_asked = client.audio.transcriptions.create(**how, extra_body=extra)
    assert {event.type for event in not_asked} == {"transcript.text.delta", "transcript.text.done"}


def test_a_stream_of_verbose_json_has_times(server: LiveServer) -> None:
    fields = {
        "stream": "true",
        "response_format": "verbose_json",
        "timestamp_granularities[]": "word",
        "include[]": "canvas",
    }
    answer = server.transcribe(EXAMPLE.read_bytes(), **fields)
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.strip().split("\n\n")
    assert blocks[-1] == "data: [DONE]"
    events = [json.loads(block.split("data: ")[1]) for block in blocks[:-1]]
    assert [block.split("\n")[0] for block in blocks[:-1]] == [f"event: {event['type']}" for event in events]
    (segment,) = (event for event in events if event["type"] == "transcript.text.segment")
    assert [word["word"] for word in segment["words"]] == segment["text"].split() and segment["language"] == "en"
    assert events[0]["type"] == "canvas.step" and events[0]["step"] == -1  # the model's draft is its transcript
    assert "".join(token["text"] for token in events[0]["tokens"]).strip() == segment["text"]


def test_log_probabilities_spell_the_text(client: Any) -> None:
    plain = client.audio.transcriptions.create(model="mini", file=EXAMPLE, include=["logprobs"])
    assert "".join(entry.token for entry in plain.logprobs) == plain.text
    assert all(entry.logprob <= 0 and bytes(map(int, entry.bytes)).decode() == entry.token for entry in plain.logprobs)
    *deltas, done = client.audio.transcriptions.create(model="mini", file=EXAMPLE, include=["logprobs"], stream=True)
    assert [entry.token for delta in deltas for entry in delta.logprobs] == [entry.token for entry in done.logprobs]


def test_the_package_may_send_all_that_it_knows(client: Any) -> None:
    heard = client.audio.transcriptions.create(
        model="gpt-4o-transcribe",
        file=("talk.flac", EXAMPLE.read_bytes()),
        language="en",
        languages=["en", "de"],
        prompt="",
        temperature=0.2,
        chunking_strategy={"type": "server_vad", "threshold": 0.4},
        extra_body={"steps": 2, "start": "draft"},
    )
    assert heard.text
    assert client.audio.transcriptions.create(model="mini", file=EXAMPLE, chunking_strategy="auto").text.startswith(TEXT)


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["mini"]
    assert client.models.retrieve("mini").id == client.models.retrieve("whisper-1").id == "mini"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("meta/other")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_context_and_languages_go_to_models_that_were_trained_for_them(whisper_folder: Path, backbone_folder: Path) -> None:
    able = tiny_model(whisper_folder, backbone_folder, finds_language=True, reads_context=True)
    with serving(ServerSettings(models=("tiny",), device="cpu"), lambda name: able) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        sound = EXAMPLE.read_bytes()

        def heard(**fields: Any) -> Any:
            extra = {"start": "noise", "steps": 2}
            return client.audio.transcriptions.create(model="tiny", file=("a.wav", sound), extra_body=extra, **fields)

        named = heard(language="German", prompt="Before.", keywords=["mill", "river"])
        assert [language.code for language in named.languages] == ["de"]
        assert heard(language="de").text != named.text  # the context is read
        assert heard(languages=["fr", "zh"]).languages[0].code in ("fr", "zh")
        with pytest.raises(openai.BadRequestError, match=r"a prompt may have \d+ tokens, .* less than 1024; shorten"):
            heard(language="de", prompt="mill " * 700)
        assert server.get("/v1/models").json()["data"][0]["languages"] == ["en", "de", "fr", "es", "hi", "zh"]


def test_silence_is_an_empty_text(server: LiveServer) -> None:
    silence = write_wav(np.zeros(32_000, np.float32))
    assert server.transcribe(silence).json()["text"] == ""
    verbose = server.transcribe(silence, response_format="verbose_json").json()
    assert verbose["segments"] == [] and verbose["duration"] == 2.0 and verbose["language"] == "english"
    assert server.transcribe(silence, response_format="srt").text == ""


# -- errors ------------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": "other"}, 404, "model"),
    ({"language": "xx"}, 400, "language"),
    ({"language": "it"}, 400, "language"),
    ({"languages[]": ["en", "it"]}, 400, "languages"),
    ({"language": "en", "languages[]": ["de", "fr"]}, 400, "language"),
    ({"prompt": "The mill."}, 400, "prompt"),
    ({"keywords[]": ["mill"]}, 400, "keywords"),
    ({"prompt": "x" * 5000}, 400, "prompt"),
    ({"response_format": "diarized_json"}, 400, "response_format"),
    ({"response_format": "srt", "stream": "true"}, 400, "response_format"),
    ({"timestamp_granularities[]": "word"}, 400, "timestamp_granularities"),
    ({"timestamp_granularities[]": "letter", "response_format": "verbose_json"}, 400, "timestamp_granularities"),
    ({"include[]": "canvas"}, 400, "include"),
    ({"include[]": "logprobs", "response_format": "text"}, 400, "include"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"temperature": "nan"}, 400, "temperature"),
    ({"temperature": "1.5"}, 400, "temperature"),
    ({"steps": "0"}, 400, "steps"),
    ({"steps": "1e9"}, 400, "steps"),
    ({"seed": "9" * 30}, 400, "seed"),
    ({"start": "nowhere"}, 400, "start"),
    ({"stream": "perhaps"}, 400, "stream"),
    ({"chunking_strategy": "{"}, 400, "chunking_strategy"),
    ({"chunking_strategy": "[1]"}, 400, "chunking_strategy"),
    ({"chunking_strategy[type]": "server_vad", "chunking_strategy[threshold]": "2"}, 400, "chunking_strategy"),
    ({"chunking_strategy[silence_duration_ms]": "200"}, 400, "chunking_strategy"),
    ({"known_speaker_names[]": ["Ann"]}, 400, "known_speaker_names"),
    ({"temprature": "0"}, 400, "temprature"),
]


@pytest.mark.parametrize("fields, status, param", REFUSED, ids=[",".join(fields) for fields, _, _ in REFUSED])
def test_what_cannot_be_done_is_refused_by_name(server: LiveServer, fields: dict[str, Any], status: int, param: str) -> None:
    answer = server.transcribe(EXAMPLE.read_bytes(), **fields)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param) and error["message"]


def test_every_error_has_the_same_shape(server: LiveServer) -> None:
    post = httpx.post
    url = f"{server.url}/v1/audio"
    answers = {
        404: server.get("/v1/nothing"),
        405: httpx.put(f"{server.url}/v1/models"),
        400: post(f"{url}/translations", files={"file": EXAMPLE.read_bytes()}, data={"model": "whisper-1"}),
    }
    bad = [
        post(f"{url}/transcriptions", json={"model": "mini"}),
        post(f"{url}/transcriptions", data={"model": "mini"}),
        post(f"{url}/transcriptions", data={"file": "talk.wav"}, files={"model": ("x", b"mini")}),
        post(
            f"{url}/transcriptions", content=b"--x\r\nnonsense", headers={"Content-Type": "multipart/form-data; boundary=x"}
        ),
        post(f"{url}/transcriptions", content=b"", headers={"Content-Type": "multipart/form-data"}),
        post(f"{url}/transcriptions", files=[("file", b"a"), ("file", b"b")], data={"model": "mini"}),
    ]
    for status, answer in (*answers.items(), *((400, answer) for answer in bad)):
        assert answer.status_code == status, answer.text
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", ["true", "false"])
def test_bad_sound_is_refused_before_it_queues(server: LiveServer, stream: str) -> None:
    whole = write_wav(np.zeros(16_000, np.float32))
    for name, sound in {
        "text.wav": b"not sound",
        "empty.mp3": b"",
        "short.wav": whole[:1000],
        "cut.wav": whole[:30],
    }.items():
        answer = server.transcribe(sound, name, stream=stream)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("file", "invalid_audio") and name in error["message"]


def test_sound_that_turns_bad_ends_the_answer(server: LiveServer, client: Any, speech: Samples, tmp_path: Path) -> None:
    broken = np.concatenate([speech, np.zeros(16_000, np.float32), speech])
    broken[-1000] = np.nan
    path = write(tmp_path / "broken.wav", broken, codec="pcm_f32le")
    with pytest.raises(openai.BadRequestError, match=r"broken\.wav: a sample that is NaN"):
        client.audio.transcriptions.create(model="mini", file=path)
    events = []
    with pytest.raises(openai.APIError, match="NaN"):
        for event in client.audio.transcriptions.create(model="mini", file=path, stream=True):
            events.append(event.type)
    assert events == ["transcript.text.delta"]
    server.wait_until_quiet()


def test_a_key_is_asked_for(model: DiffusionGemmaASR) -> None:
    settings = ServerSettings(models=("mini",), device="cpu", api_key="sesame")
    with serving(settings, lambda name: model) as server:
        for key in ("wrong", "sesame2"):
            with pytest.raises(openai.AuthenticationError) as caught:
                openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0).models.list()
            assert caught.value.code == "invalid_api_key"
        assert server.get("/v1/models", headers={"Authorization": "Bearer sésame".encode()}).status_code == 401
        assert server.transcribe(EXAMPLE.read_bytes() * 50).status_code == 401
        assert server.get("/metrics").status_code == 401
        assert server.get("/health").status_code == server.get("/ready").status_code == 200
        right = {"Authorization": "Bearer sesame"}
        assert server.get("/metrics", headers=right).status_code == 200
        assert server.transcribe(EXAMPLE.read_bytes(), headers=right).json()["text"].startswith(TEXT)


def test_pages_of_other_sites_may_use_it_only_where_it_was_said(server: LiveServer, model: DiffusionGemmaASR) -> None:
    asks = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.get("/v1/models", headers=asks).headers
    settings = ServerSettings(models=("mini",), device="cpu", origins=("https://example.org",), api_key="sesame")
    with serving(settings, lambda name: model) as open_server:
        before = httpx.options(f"{open_server.url}/v1/audio/transcriptions", headers=asks)
        assert before.status_code == 200 and before.headers["access-control-allow-origin"] == "https://example.org"
        refused = open_server.get("/v1/models", headers=asks)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://example.org"


# -- more than one at a time -------------------------------------------------------------------------------------------


def test_a_transcript_does_not_depend_on_what_else_is_in_the_batch(server: LiveServer, speech: Samples) -> None:
    rng = np.random.default_rng(0)
    asked = []
    for number in range(15):
        parts = [speech[: rng.integers(16_000, len(speech))] for _ in range(rng.integers(1, 3))]
        sound = write_wav(np.concatenate([part for one in parts for part in (one, np.zeros(16_000, np.float32))]))
        asked.append((sound, {"start": "draft", "steps": "2", "seed": str(number)} if number % 3 == 0 else {}))
    alone = [server.transcribe(sound, **fields).json() for sound, fields in asked]
    with ThreadPoolExecutor(12) as clients:
        together = list(clients.map(lambda one: server.transcribe(one[0], **one[1]).json(), asked))
    assert together == alone and len({answer["text"] for answer in alone}) > 5


def test_a_short_one_is_answered_while_a_long_one_runs(server: LiveServer, minutes: bytes) -> None:
    with httpx.stream("POST", f"{server.url}/v1/audio/transcriptions", **form(minutes, stream="true")) as long:
        lines = long.iter_lines()
        next(lines)
        assert server.transcribe(EXAMPLE.read_bytes()).json()["text"].startswith(TEXT)
        assert not server.quiet  # the long one is still at it
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-1]["type"] == "transcript.text.done" and events[-1]["text"].count(TEXT) >= 18


def test_with_too_many_the_package_comes_again(model: DiffusionGemmaASR) -> None:
    settings = ServerSettings(models=("mini",), device="cpu", max_queue=1)
    with serving(settings, lambda name: model) as server, contextlib.ExitStack() as held:
        first = held.enter_context(connection(server))
        first.sendall(header(1000))  # its upload has begun
        until(lambda: server.models.under_way == 1)
        refused = server.transcribe(EXAMPLE.read_bytes())
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        once = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            once.audio.transcriptions.create(model="mini", file=EXAMPLE)
        threading.Timer(0.5, first.close).start()
        patient = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=2)
        assert patient.audio.transcriptions.create(model="mini", file=EXAMPLE).text.startswith(TEXT)
