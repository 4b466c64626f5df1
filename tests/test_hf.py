"""transformers' own ways into our model: the Auto classes, the processor, the speech recognition pipeline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from sounds import write
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutomaticSpeechRecognitionPipeline,
    AutoModel,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import KeyDataset

import diffusion_gemma_asr as asr
import diffusion_gemma_asr.hf as hf
from diffusion_gemma_asr.audio.read import load_audio
from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.checkpoint.save import save_checkpoint
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.errors import AsrError, AudioError, CheckpointError

TASK = "automatic-speech-recognition"
EXAMPLE = Path(__file__).parents[1] / "examples" / "en.flac"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, whisper_folder: Path, backbone_folder: Path) -> Path:
    """A tiny checkpoint, not to be changed."""
    config = tiny.model_config(whisper_folder, backbone_folder)
    return save_checkpoint(tiny.build_model(config), tmp_path_factory.mktemp("hf") / "checkpoint")


@pytest.fixture(scope="module")
def pipe() -> hf.DiffusionGemmaASRPipeline:
    return pipeline(TASK, model=hf.bundled("mini"), device="cpu")


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    return load_audio(EXAMPLE)


@pytest.fixture(scope="module")
def long_sound(sound: np.ndarray) -> np.ndarray:
    """The example three times, a second of silence after each: 12 s."""
    return np.concatenate([sound, np.zeros(16_000, np.float32)] * 3)


def expected(pipe: hf.DiffusionGemmaASRPipeline, sound: Any, **options: Any) -> asr.Transcript:
    return pipe.model.recognizer.transcribe(sound, **options)


# -- Auto classes ------------------------------------------------------------------------------------------


def test_the_package_itself_stays_without_them() -> None:
    code = "import sys, diffusion_gemma_asr; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_configuration_is_the_checkpoint_s(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, hf.DiffusionGemmaASRConfig)
    assert config.model_type == "diffusion_gemma_asr"
    assert (config.encoder["width"], config.backbone["layers"], config.lora["rank"]) == (16, 6, 4)
    assert (config.name, config.languages, config.finds_language) == ("tiny", ["en", "de"], False)
    content = json.loads((folder / "config.json").read_text())
    assert {key: config.to_dict()[key] for key in content} == content


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSpeechSeq2Seq])
def test_models_are_those_of_load(folder: Path, auto_class: Any) -> None:
    model = auto_class.from_pretrained(folder)
    assert isinstance(model, hf.DiffusionGemmaASRForSpeechSeq2Seq)
    assert (model.device, model.dtype, model.training) == (torch.device("cpu"), torch.float32, False)
    same = load_checkpoint(folder, device="cpu").state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.asr.state_dict().items())


def test_options_of_loading_reach_the_model(folder: Path, tmp_path: Path) -> None:
    load = AutoModelForSpeechSeq2Seq.from_pretrained
    assert load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(folder, dtype="auto").dtype == torch.float32
    assert load(folder, device_map={"": "cpu"}).hf_device_map == {"": torch.device("cpu")}
    with pytest.raises(CheckpointError, match="no such folder"):
        load(folder, backbone=tmp_path / "nowhere")
    with pytest.raises(AsrError, match="2 devices; this model stands on one"):
        load(folder, device_map={"encoder": "cpu", "backbone": "cuda:0"})
    with pytest.raises(AsrError, match="attn_implementation is no option of this model; give dtype"):
        hf.DiffusionGemmaASRForSpeechSeq2Seq.from_pretrained(folder, attn_implementation="eager")
    with pytest.raises(AsrError, match="give the token by `hf auth login` or HF_TOKEN"):
        load(folder, token="secret")
    with pytest.raises(AsrError, match="holds no weights; load the checkpoint with from_pretrained"):
        AutoModelForSpeechSeq2Seq.from_config(AutoConfig.from_pretrained(folder))


def test_a_model_is_saved_as_our_checkpoint(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, merge_lora=False)
    model.save_pretrained(tmp_path / "again")
    again = load_checkpoint(tmp_path / "again", device="cpu", merge_lora=False).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.asr.state_dict().items())
    with pytest.raises(CheckpointError, match="save the checkpoint before merging"):
        AutoModelForSpeechSeq2Seq.from_pretrained(folder).save_pretrained(tmp_path / "merged")


def test_processor_and_generate_write_what_transcribing_does(folder: Path, sound: np.ndarray) -> None:
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    assert isinstance(processor, hf.DiffusionGemmaASRProcessor)
    clips = [sound, sound[:20_000]]
    inputs = processor(clips, sampling_rate=16_000)
    assert inputs["input_features"].shape == (2, 80, 300)
    assert inputs["attention_mask"].sum(1).tolist() == [300, 125]
    ids = model.generate(**inputs, language="de", seed=3)
    texts = processor.batch_decode(ids, skip_special_tokens=True)
    wanted = decode_clips(model.asr, clips, DecodeOptions(language="de", seed=3))
    assert [text.strip() for text in texts] == [decoded.text for decoded in wanted]
    assert ids[0, : len(wanted[0].tokens)].tolist() == wanted[0].tokens
    assert torch.equal(processor(sound)["input_features"][0], inputs["input_features"][0])


def test_generate_refuses_what_the_model_does_not_know(folder: Path, sound: np.ndarray) -> None:
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    inputs = processor([sound])
    with pytest.raises(AsrError, match="the model tiny was not trained for language 'fr'; it knows en, de"):
        model.generate(**inputs, language="fr")
    with pytest.raises(AsrError, match="num_beams is no option here"):
        model.generate(**inputs, language="en", num_beams=5)


def test_bundled_models_have_folders() -> None:
    assert (Path(hf.bundled()) / "config.json").is_file() and Path(hf.bundled("mini")).name == "mini"
    with pytest.raises(AsrError, match="maxi is no bundled checkpoint; give mini"):
        hf.bundled("maxi")


def test_the_processor_refuses_what_it_cannot_use(folder: Path, sound: np.ndarray) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    with pytest.raises(AudioError, match=r"a clip of 36.04 s; give 0.02 s to 30 s, or use the pipeline"):
        processor(np.tile(sound, 12))
    with pytest.raises(AudioError, match="the sampling rate is 8000 Hz; resample to 16000"):
        processor(sound, sampling_rate=8000)
    with pytest.raises(AsrError, match="only 'pt'"):
        processor(sound, return_tensors="np")


def test_tokenizer_and_features_are_the_parts_own(folder: Path, whisper_folder: Path, backbone_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(backbone_folder).get_vocab()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert extractor.to_dict() == WhisperFeatureExtractor.from_pretrained(whisper_folder).to_dict()


# -- the pipeline ------------------------------------------------------------------------------------------


def test_the_pipeline_takes_every_form_of_sound(
    pipe: hf.DiffusionGemmaASRPipeline, sound: np.ndarray, tmp_path: Path
) -> None:
    wanted = {"text": expected(pipe, sound).text}
    assert wanted["text"]
    decoder = SimpleNamespace(  # of torchcodec
        get_all_samples=lambda: SimpleNamespace(data=torch.from_numpy(sound)[None], sample_rate=16_000)
    )
    path = str(write(tmp_path / "a.wav", sound))
    forms = [
        str(EXAMPLE),
        EXAMPLE,
        EXAMPLE.read_bytes(),
        sound,
        torch.from_numpy(sound),
        {"raw": sound, "sampling_rate": 16_000},
        {"array": sound.tolist(), "sampling_rate": 16_000, "path": path},
        decoder,
    ]
    assert [pipe(form) for form in forms] == [wanted] * len(forms)
    assert pipe(forms, batch_size=3) == [wanted] * len(forms)


def test_sound_in_a_dict_is_resampled(pipe: hf.DiffusionGemmaASRPipeline, sound: np.ndarray) -> None:
    slow = sound[::2].copy()
    assert pipe({"raw": slow, "sampling_rate": 8000})["text"] == expected(pipe, slow, sampling_rate=8000).text


def test_generators_and_data_sets_are_read_as_needed(pipe: hf.DiffusionGemmaASRPipeline, sound: np.ndarray) -> None:
    read = []

    def rows() -> Any:
        for number in range(40):
            read.append(number)
            yield {"raw": sound, "sampling_rate": 16_000, "reference": f"text {number}"}

    answers = pipe(rows(), batch_size=1)
    assert len(read) <= 1  # the library looks at the first one
    first = next(answers)
    assert first == {"text": expected(pipe, sound).text, "reference": ["text 0"]}
    assert len(read) < 40
    data = KeyDataset([{"audio": sound}, {"audio": str(EXAMPLE)}], "audio")
    assert [answer["text"] for answer in pipe(data)] == [first["text"]] * 2
    assert pipe([]) == []


def test_segments_with_times(pipe: hf.DiffusionGemmaASRPipeline, long_sound: np.ndarray) -> None:
    answer = pipe(long_sound, return_timestamps=True, chunk_length_s=5)
    transcript = expected(pipe, long_sound, chunk_length=5)
    assert answer["text"] == transcript.text == "".join(chunk["text"] for chunk in answer["chunks"])
    segments = [segment for segment in transcript.segments if segment.text]
    assert [chunk["timestamp"] for chunk in answer["chunks"]] == [(segment.start, segment.end) for segment in segments]
    assert len(segments) > 1


def test_words_with_times(pipe: hf.DiffusionGemmaASRPipeline, long_sound: np.ndarray) -> None:
    answer = pipe(long_sound, return_timestamps="word", chunk_length_s=5)
    transcript = expected(pipe, long_sound, chunk_length=5, word_timestamps=True)
    assert answer["text"] == transcript.text == "".join(chunk["text"] for chunk in answer["chunks"])
    words = [word for segment in transcript.segments for word in segment.words or ()]
    assert [chunk["timestamp"] for chunk in answer["chunks"]] == [(word.start, word.end) for word in words]
    assert [chunk["text"].strip() for chunk in answer["chunks"]] == [word.word.strip() for word in words]
    assert len(words) == len(answer["text"].split())


def test_options_are_kept_from_the_start_and_changed_by_a_call() -> None:
    folder, sound = hf.bundled("mini"), EXAMPLE.with_name("de.flac")  # which two seeds write differently
    pipe = pipeline(TASK, model=folder, device="cpu", return_timestamps="word", start="noise", seed=5)
    assert pipe(sound)["text"] == expected(pipe, sound, start="noise", seed=5).text
    assert pipe(sound, return_timestamps=False) == {"text": pipe(sound)["text"]}
    other = pipe(sound, return_timestamps=None, seed=6, generate_kwargs={"steps": 1})
    assert other["text"] == expected(pipe, sound, start="noise", seed=6, steps=1).text
    assert other["text"] != pipe(sound)["text"]
    assert len(other["chunks"]) == len(other["text"].split())


REFUSED: list[tuple[Any, dict[str, Any], type[AsrError], str]] = [
    (EXAMPLE, {"num_beams": 5}, AsrError, "num_beams is no option of this pipeline; leave it out, or give one of return"),
    (EXAMPLE, {"stride_length_s": 5}, AsrError, "stride_length_s is no option"),
    (EXAMPLE, {"return_timestamps": "char"}, AsrError, "return_timestamps is 'char'; give True for segments, or 'word'"),
    (EXAMPLE, {"chunk_length_s": 45}, AsrError, "45"),
    (EXAMPLE, {"language": "xx"}, AsrError, "language 'xx'"),
    ("https://host/a.wav", {}, AudioError, "addresses are not fetched; download the file"),
    ("nowhere.wav", {}, AudioError, "nowhere.wav: no such file"),
    ([EXAMPLE, "nowhere.wav"], {}, AudioError, "nowhere.wav: no such file"),
    ({"raw": np.zeros(9)}, {}, AudioError, "a dict with 'raw'; give 'array' or 'raw', and 'sampling_rate' in Hz"),
    ({"raw": np.zeros(9), "sampling_rate": 1, "stride": (1, 1)}, {}, AudioError, "a dict with 'stride'"),
]


@pytest.mark.parametrize(("sound", "options", "error", "message"), REFUSED, ids=[row[3][:24] for row in REFUSED])
def test_what_cannot_be_used_is_refused_in_one_line(
    pipe: hf.DiffusionGemmaASRPipeline, sound: Any, options: dict[str, Any], error: type[AsrError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        pipe(sound, **options)
    assert "\n" not in str(caught.value)


def test_a_tiny_checkpoint_with_options_of_loading(folder: Path, backbone_folder: Path, sound: np.ndarray) -> None:
    pipe = pipeline(TASK, model=folder, dtype="bfloat16", device_map="cpu", model_kwargs={"backbone": backbone_folder})
    assert isinstance(pipe, hf.DiffusionGemmaASRPipeline)
    assert (pipe.model.dtype, pipe.device) == (torch.bfloat16, torch.device("cpu"))
    assert pipe(sound, generate_kwargs={"language": "de"})["text"] == expected(pipe, sound, language="de").text
    assert pipe.tokenizer.vocab_size == tiny.VOCAB_SIZE and pipe.feature_extractor.sampling_rate == 16_000


def test_a_pipeline_of_parts_and_its_saving(folder: Path, tmp_path: Path, sound: np.ndarray) -> None:
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, merge_lora=False)
    parts = AutoProcessor.from_pretrained(folder)
    pipe = pipeline(TASK, model=model, tokenizer=parts.tokenizer, feature_extractor=parts.feature_extractor, device="cpu")
    assert isinstance(pipe, hf.DiffusionGemmaASRPipeline) and pipe.tokenizer is parts.tokenizer
    pipe.save_pretrained(tmp_path / "again")
    again = pipeline(TASK, model=tmp_path / "again", device="cpu", model_kwargs={"merge_lora": False})
    assert again(sound, language="en")["text"] == pipe(sound, language="en")["text"]


def test_a_hub_repository_in_the_cache_is_taken_by_name(folder: Path, tmp_path: Path, sound: np.ndarray) -> None:
    """The cache of huggingface_hub, laid out by hand: models--OWNER--NAME/{refs,snapshots}. Its place is read at import,
    so this takes a process of its own."""
    repository = tmp_path / "models--someone--asr"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    code = (
        "from transformers import pipeline\nimport diffusion_gemma_asr.hf\n"
        f"pipe = pipeline({TASK!r}, model='someone/asr', device='cpu')\n"
        f"print(ascii(pipe({str(EXAMPLE)!r}, language='en')['text']))"
    )
    # One thread, as here: sums in another order would lead a random model to another text.
    where = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    here = asr.load(folder, device="cpu", dtype="float32").transcribe(sound, language="en").text
    assert found.stdout.strip() == ascii(here)


def test_other_models_get_the_pipeline_they_had(whisper_folder: Path, backbone_folder: Path) -> None:
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(backbone_folder),
        "feature_extractor": WhisperFeatureExtractor.from_pretrained(whisper_folder),
    }
    pipe = pipeline(TASK, model=WhisperForConditionalGeneration.from_pretrained(whisper_folder), device="cpu", **parts)
    assert type(pipe) is AutomaticSpeechRecognitionPipeline
    assert (pipe.type, pipe.tokenizer) == ("seq2seq_whisper", parts["tokenizer"])
    entry = PIPELINE_REGISTRY.supported_tasks[TASK]
    assert entry["default"]["model"][0] == "facebook/wav2vec2-base-960h"
    for flag in ("processor", "image_processor", "video_processor", "feature_extractor", "tokenizer"):
        name = f"_load_{flag}"
        assert getattr(entry["impl"], name) == getattr(AutomaticSpeechRecognitionPipeline, name)
