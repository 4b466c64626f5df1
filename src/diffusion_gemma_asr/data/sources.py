"""Where utterances come from: a manifest, a folder of sounds with their texts, or a corpus by name.

path/to/manifest.jsonl          see data/manifest.py
path/to/folder                  sound files, each with its transcript beside it as NAME.txt
librispeech                     all its parts; the split is "test"
librispeech:clean               one part
fleurs:de                       the part of a language
librispeech:clean/train.100     another split
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from glob import escape
from pathlib import Path

from ..audio import SAMPLE_RATE, load_audio
from ..errors import AudioError, DataError
from .hub import CORPORA, store
from .manifest import Utterance, read_manifest

_NAME = re.compile(r"(?P<name>[a-z_]+)(:(?P<part>\w+))?(/(?P<split>[\w.]+))?")


def read_source(
    source: str | Path,
    languages: Iterable[str] = (),
    max_duration_s: float = 30.0,
    skipped: list[str] | None = None,
    folder_language: str = "en",
    split: str = "test",
) -> list[Utterance]:
    """The utterances of a source.

    Args:
        source: see above. What exists as a path is one.
        languages, max_duration_s, skipped: see `read_manifest`.
        folder_language: spoken in a folder of sounds, which does not say it itself.
        split: of a corpus where the name says none.

    Raises:
        DataError: no such manifest, folder or corpus; otherwise as `read_manifest` and `hub.store`.
    """
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, languages, max_duration_s, skipped, folder_language)
    if path.is_file() or path.suffix in (".jsonl", ".json"):
        return read_manifest(path, languages, max_duration_s, skipped)
    manifests = [store(*wanted) for wanted in corpus_parts(str(source), split)]
    return [row for manifest in manifests for row in read_manifest(manifest, languages, max_duration_s, skipped)]


def corpus_parts(source: str, split: str = "test") -> list[tuple[str, str, str]]:
    """(corpus, configuration, split) of each part that a name means.

    Raises:
        DataError: an unknown corpus or part; the message offers the nearest, or all.
    """
    parsed = _NAME.fullmatch(source)
    if parsed is None or parsed["name"] not in CORPORA:
        name = source if parsed is None else parsed["name"]
        near = difflib.get_close_matches(name, CORPORA, 1)
        hint = f"did you mean {near[0]}?" if near else f"corpora are {', '.join(CORPORA)}"
        raise DataError(f"{source}: no such manifest, folder or corpus; {hint}")
    parts = CORPORA[parsed["name"]].parts
    chosen = list(parts)
    if parsed["part"] is not None:
        part = parsed["part"]
        chosen = [part] if part in parts else [key for key, language in parts.items() if language == part]
        if not chosen:
            near = difflib.get_close_matches(part, parts, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(parts)}"
            raise DataError(f"{source}: {parsed['name']} has no part {part}; {hint}")
    return [(parsed["name"], part, parsed["split"] or split) for part in chosen]


def _of_folder(
    folder: Path, languages: Iterable[str], max_duration_s: float, skipped: list[str] | None, language: str
) -> list[Utterance]:
    """Every sound below a folder that has a .txt of its name beside it."""
    keep = frozenset(languages)
    texts = sorted(folder.rglob("*.txt"))
    rows = []
    for text in texts if not keep or language in keep else ():
        sounds = [file for file in sorted(text.parent.glob(f"{escape(text.stem)}.*")) if file.suffix != ".txt"]
        try:
            if not sounds:
                raise DataError(f"{text}: no sound of the same name beside it")
            duration = len(load_audio(sounds[0])) / SAMPLE_RATE
        except (AudioError, DataError) as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        if duration <= max_duration_s:
            spoken = " ".join(text.read_text(encoding="utf-8").split())
            rows.append(Utterance(str(sounds[0].resolve()), spoken, language, round(duration, 3)))
    if not rows and not skipped:
        raise DataError(
            f"{folder}: no sound file with its transcript beside it as NAME.txt, at most {max_duration_s} s long"
        )
    return rows
