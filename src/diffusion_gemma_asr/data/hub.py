"""Downloads speech corpora of the Hugging Face hub, once, as sound files with a manifest; several processes share the work.

LibriSpeech (Panayotov et al. 2015), FLEURS (Conneau et al. 2022, arXiv 2205.12446), VoxPopuli (Wang et al. 2021,
arXiv 2101.00390), through the library `datasets`. The encoded bytes of each sound are stored unchanged; audio/read.py
decodes them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

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


@dataclass(frozen=True)
class Share:
    """What one of several processes does of a common work.

    Attributes:
        worker: index of this process.
        workers: their number.
        wait: returns once all have called it.
    """

    worker: int = 0
    workers: int = 1
    wait: Callable[[], None] = lambda: None


ALONE = Share()
FLEURS = {"en_us": "en", "de_de": "de", "fr_fr": "fr", "es_419": "es", "hi_in": "hi", "cmn_hans_cn": "zh"}
CORPORA = {
    "librispeech": Corpus("openslr/librispeech_asr", {"clean": "en", "other": "en"}, "text", "speaker_id"),
    "fleurs": Corpus("google/fleurs", FLEURS, "raw_transcription"),
    "voxpopuli": Corpus("facebook/voxpopuli", {c: c for c in ("en", "de", "fr", "es")}, "normalized_text", "speaker_id"),
}


def cache_folder() -> Path:
    """The folder of downloaded corpora: `$XDG_CACHE_HOME/diffusion-gemma-asr`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-gemma-asr"


def store(
    name: str,
    part: str,
    split: str,
    folder: Path | None = None,
    corpora: Mapping[str, Corpus] = CORPORA,
    share: Share = ALONE,
) -> Path:
    """Downloads one split of one configuration, unless its manifest exists; a run that does so already is waited for.

    Each process streams a share of the split: some of its files if their number is a multiple of the processes', else every
    n-th row. The manifest is written last, so that an interrupted download starts again.

    Args:
        name: key of `corpora`.
        part: configuration of the corpus.
        split: name of the split in the corpus ("test", "train.100").
        folder: of all downloaded corpora, the same for all processes; None is `cache_folder()`.
        corpora: the known corpora by name.
        share: of this process.

    Returns:
        path of the manifest, `folder/name/part/split/manifest.jsonl`, with the sounds beside it.

    Raises:
        DataError: `datasets` is missing, the hub cannot be reached, it has no such split, or no utterance can be used,
            or the other processes have written to another folder.
    """
    corpus = corpora[name]
    place = (folder or cache_folder()) / name / part / split
    place.mkdir(parents=True, exist_ok=True)
    locks = share.worker == 0 and not (place / MANIFEST).exists()  # one for all of a run; what is there may be read-only
    with FileLock(place / ".lock") if locks else nullcontext():
        share.wait()
        if not (place / MANIFEST).exists():
            _download(corpus, part, split, place, share)
    return place / MANIFEST


def _download(corpus: Corpus, part: str, split: str, place: Path, share: Share) -> None:
    """Fills the folder of a split."""
    sounds = place / "audio"
    shutil.rmtree(sounds, ignore_errors=True)
    share.wait()
    sounds.mkdir(parents=True, exist_ok=True)
    rows, without_text = [], 0
    for number, row in enumerate(_rows(corpus, part, split, share)):
        if missing := sorted({"audio", corpus.text} - row.keys()):
            raise DataError(f"{corpus.repository}: no column {missing[0]}, but {', '.join(sorted(row))}")
        sound = row["audio"]
        suffix = Path(sound.get("path") or "").suffix or ".wav"
        content = sound.get("bytes") or Path(sound["path"]).read_bytes()
        file = sounds / f"{number * share.workers + share.worker:06d}{suffix}"
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
    parts = [sounds / f"{worker}.jsonl" for worker in range(share.workers)]
    parts[share.worker].write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    share.wait()
    if share.worker == 0:
        if not all(path.exists() for path in parts):
            raise DataError(f"{place}: a worker has not written there; let XDG_CACHE_HOME be a folder that all machines see")
        rows = [Utterance(**json.loads(line)) for path in parts for line in path.read_text().splitlines()]
        if not rows:
            raise DataError(f"{corpus.repository} ({part}, {split}): no utterance with a transcript")
        write_manifest(place / MANIFEST, sorted(rows, key=lambda row: row.audio_filepath))
        for path in parts:
            path.unlink()
    share.wait()


def _rows(corpus: Corpus, part: str, split: str, share: Share) -> Iterator[dict[str, Any]]:
    """Streams a share of the rows of a split; each sound is a dict with "bytes" and "path"."""
    try:
        import datasets
        from datasets.distributed import split_dataset_by_node
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
        stream = stream.cast_column("audio", datasets.Audio(decode=False))
        yield from split_dataset_by_node(stream, share.worker, share.workers)
    except Exception as error:  # network, hub and parsers raise many types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{where} cannot be loaded: {reason}") from error
