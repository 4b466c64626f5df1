"""Sources of utterances: a manifest, a folder of sounds with transcripts, a Shar, or a corpus by name.

path/to/manifest.jsonl          see data/manifest.py
path/to/folder                  sound files, each with its transcript in NAME.txt beside it
path/to/shar                    shards of cuts and sounds, as lhotse writes them; see data/shar.py
librispeech                     all configurations, split "test"
librispeech:clean               a single configuration
fleurs:de                       the configuration of a language
librispeech:clean/train.100     another split
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import AudioError, DataError
from ..languages import language_code
from .hub import ALONE, CORPORA, Share, store
from .manifest import Utterance, file_seconds, known_language, read_lines, read_manifest, report, why_left_out
from .shar import cuts_of, is_shar
from .text import read_text

_ENDINGS = ".wav .flac .mp3 .m4a .ogg .opus .oga .aac .wma .aif .aiff .amr .ac3 .caf .au .mka .mp4 .mkv .mov .webm .avi"
SOUNDS = frozenset(_ENDINGS.split())
_NAME = re.compile(r"(?P<name>[a-z_]+)(:(?P<part>[\w-]+))?(/(?P<split>[\w.]+))?")


def read_source(
    source: str | Path,
    languages: Iterable[str] = (),
    max_duration_s: float = 30.0,
    skipped: list[str] | None = None,
    folder_language: str = "en",
    split: str = "test",
    share: Share = ALONE,
) -> list[Utterance]:
    """Reads the utterances of a source.

    Args:
        source: path or corpus name, see above; an existing path takes precedence over a corpus.
        languages: see `read_manifest`.
        max_duration_s: see `read_manifest`.
        skipped: see `read_manifest`.
        folder_language: code or name of the language of a folder of sounds, and of cuts of a Shar that name none.
        split: of a corpus whose name does not give one.
        share: of this process in downloading a corpus.

    Returns:
        utterances, in the order of the source.

    Raises:
        DataError: no such manifest, folder or corpus; otherwise as `read_manifest` and `hub.store`.
        AsrError: `folder_language` is not one of the six languages.
    """
    path = Path(source)
    if path.is_dir() and is_shar(path):
        cuts = cuts_of(path.resolve(), language_code(folder_language))
        return read_lines(cuts, path, languages, max_duration_s, skipped)
    if path.is_dir():
        return _of_folder(path, languages, max_duration_s, skipped, folder_language)
    if path.is_file() or path.suffix in (".jsonl", ".json"):
        return read_manifest(path, languages, max_duration_s, skipped)
    manifests = [store(*part, share=share) for part in corpus_parts(str(source), split)]
    return [row for manifest in manifests for row in read_manifest(manifest, languages, max_duration_s, skipped)]


def corpus_parts(source: str, split: str = "test") -> list[tuple[str, str, str]]:
    """Resolves the name of a corpus.

    Args:
        source: CORPUS, CORPUS:PART or CORPUS:PART/SPLIT; PART is a configuration or a language.
        split: used if the name does not give one.

    Returns:
        (corpus, configuration, split) of each matching configuration.

    Raises:
        DataError: an unknown corpus or part; the message suggests the closest name, or lists all.
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
        chosen = [part] if part in parts else [key for key, code in parts.items() if code == known_language(part)]
        if not chosen:
            near = difflib.get_close_matches(part, parts, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(parts)}"
            raise DataError(f"{source}: {parsed['name']} has no part {part}; {hint}")
    return [(parsed["name"], part, parsed["split"] or split) for part in chosen]


def _of_folder(
    folder: Path, languages: Iterable[str], max_duration_s: float, skipped: list[str] | None, language: str
) -> list[Utterance]:
    """The utterances of a folder and its subfolders: sound files with a .txt of the same name; others are left out."""
    keep = frozenset(map(known_language, languages))
    language = language_code(language)
    rows, left_out = [], []
    for name, files in sorted(_by_name(folder).items()):
        texts = [file for file in files if file.suffix.lower() == ".txt"]
        sounds = [file for file in files if file.suffix.lower() in SOUNDS] or [f for f in files if f not in texts]
        if not texts:
            if sounds[0].suffix.lower() in SOUNDS:
                left_out.append(f"{sounds[0]}: no transcript beside it as {name.name}.txt")
            continue
        try:
            if not sounds:
                raise DataError(f"{texts[0]}: no sound of the same name beside it")
            text = " ".join(read_text(texts[0]).split())
            duration = round(file_seconds(str(sounds[0])), 3)
        except (AudioError, DataError) as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        utterance = Utterance(str(sounds[0].resolve()), text, language, duration)
        if why := why_left_out(utterance, keep, max_duration_s):
            left_out.append(f"{sounds[0]}: {why}")
        else:
            rows.append(utterance)
    report(left_out, skipped)
    if not rows and not skipped:
        hint = f" ({left_out[0]})" if left_out else ""
        raise DataError(
            f"{folder}: no sound file with its transcript beside it as NAME.txt, at most {max_duration_s} s long{hint}"
        )
    return rows


def _by_name(folder: Path) -> dict[Path, list[Path]]:
    """The files of a folder and its subfolders, sorted, by path without suffix; hidden files are ignored."""
    by_name: dict[Path, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            by_name.setdefault(file.with_suffix(""), []).append(file)
    return by_name
