"""Downloads speech corpora of the Hugging Face hub, once, as sound files with a manifest.

LibriSpeech (Panayotov et al. 2015), FLEURS (Conneau et al. 2022, arXiv 2205.12446), VoxPopuli (Wang et al. 2021,
arXiv 2101.00390), through the library `datasets`. The encoded bytes of each sound are stored unchanged; audio/read.py
decodes them.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..audio.read import SAMPLE_RATE, load_audio
from ..errors import AudioError, DataError
from .manifest import Utterance, write_manifest

MANIFEST = "manifest.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """The location and the column names of a corpus; the sound is in the column `audio`.

    Attributes:
        repository: hub name, or a folder in the same layout.
        parts: language code of each supported configuration.
        text: column of the transcript.
        speaker: column of the speaker; None if the corpus has none.
    """

    repository: str
    parts: Mapping[str, str]
    text: str
    speaker: str | None = None


FLEURS = {"en_us": "en", "de_de": "de", "fr_fr": "fr", "es_419": "es", "hi_in": "hi", "cmn_hans_cn": "zh"}
CORPORA = {
    "librispeech": Corpus("openslr/librispeech_asr", {"clean": "en", "other": "en"}, "text", "speaker_id"),
    "fleurs": Corpus("google/fleurs", FLEURS, "raw_transcription"),
    "voxpopuli": Corpus("facebook/voxpopuli", {c: c for c in ("en", "de", "fr", "es")}, "normalized_text", "speaker_id"),
}


def cache_folder() -> Path:
    """The folder of downloaded corpora: `$XDG_CACHE_HOME/diffusion-gemma-asr`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-gemma-asr"


def store(name: str, part: str, split: str, folder: Path | None = None, corpora: Mapping[str, Corpus] = CORPORA) -> Path:
    """Downloads one split of one configuration, unless its manifest exists.

    The manifest is written last, so that an interrupted download starts again.

    Args:
        name: key of `corpora`.
        part: configuration of the corpus.
        split: name of the split in the corpus ("test", "train.100").
        folder: of all downloaded corpora; None is `cache_folder()`.
        corpora: the known corpora by name.

    Returns:
        path of the manifest, `folder/name/part/split/manifest.jsonl`, with the sounds beside it.

    Raises:
        DataError: `datasets` is missing, the hub cannot be reached, it has no such split, or no utterance can be used.
    """
    corpus = corpora[name]
    place = (folder or cache_folder()) / name / part / split
    if (place / MANIFEST).exists():
        return place / MANIFEST
    sounds = place / "audio"
    shutil.rmtree(sounds, ignore_errors=True)
    sounds.mkdir(parents=True)
    rows, without_text = [], 0
    for number, row in enumerate(_rows(corpus, part, split)):
        if missing := sorted({"audio", corpus.text} - row.keys()):
            raise DataError(f"{corpus.repository}: no column {missing[0]}, but {', '.join(sorted(row))}")
        sound = row["audio"]
        suffix = Path(sound.get("path") or "").suffix or ".wav"
        content = sound.get("bytes") or Path(sound["path"]).read_bytes()
        file = sounds / f"{number:06d}{suffix}"
        file.write_bytes(content)
        try:
            duration = len(load_audio(file)) / SAMPLE_RATE
        except AudioError:
            duration = 0.0  # listed nevertheless: read_manifest reports files that cannot be read
        text = (row[corpus.text] or "").strip()
        speaker = "" if corpus.speaker is None else str(row.get(corpus.speaker) or "")
        if text:
            rows.append(Utterance(str(file), text, corpus.parts[part], round(duration, 3), speaker))
        else:
            without_text += 1
    if without_text:
        message = "%s (%s, %s): %d utterances without a transcript left out"
        logger.warning(message, corpus.repository, part, split, without_text)
    if not rows:
        raise DataError(f"{corpus.repository} ({part}, {split}): no utterance with a transcript")
    write_manifest(place / MANIFEST, rows)
    return place / MANIFEST


def _rows(corpus: Corpus, part: str, split: str) -> Iterator[dict[str, Any]]:
    """Streams the rows of a split; each sound is a dict with "bytes" and "path"."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise DataError("corpora by name need `datasets`: pip install 'diffusion-gemma-asr[datasets]'") from None
    where = f"{corpus.repository} ({part}, {split})"
    try:
        try:
            stream = datasets.load_dataset(corpus.repository, part, split=split, streaming=True)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # The hub keeps a copy without code of corpora that are still published as a script.
            stream = datasets.load_dataset(
                corpus.repository, part, split=split, streaming=True, revision="refs/convert/parquet"
            )
        yield from stream.cast_column("audio", datasets.Audio(decode=False))
    except Exception as error:  # network, hub and parsers raise many types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{where} cannot be loaded: {reason}") from error
