"""lexicon.py, lexicon_beam.py and draft_search.py: a dictionary, the words that sound as was heard, and who is believed."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from test_speller import clear, language_model, spelling_of
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diffusion_gemma_asr.ctc import scores
from diffusion_gemma_asr.data import espeak
from diffusion_gemma_asr.data.manifest import Utterance
from diffusion_gemma_asr.data.phonemes import accent_of, pronunciations, simplified
from diffusion_gemma_asr.draft_search import (
    FINAL_WEIGHTS,
    FINALISTS,
    SPELLED_WEIGHTS,
    WEIGHTS,
    DraftSearch,
    best_weights,
    likeliest,
)
from diffusion_gemma_asr.errors import CheckpointError, DataError
from diffusion_gemma_asr.lexicon import Lexicon, lexicon_of, symbols_of
from diffusion_gemma_asr.lexicon_beam import WORD_BONUS, LexiconSearch
from diffusion_gemma_asr.recurrent_lm import RecurrentLM
from diffusion_gemma_asr.speller import Alphabet, Spellings
from diffusion_gemma_asr.token_scores import TokenScores
from diffusion_gemma_asr.train.lexicon import BESIDE, counted, frequent_words, make_lexicon, parted

needs_espeak = pytest.mark.skipif(
    espeak.library_name() is None, reason="needs the espeak-ng library (Debian: apt-get install espeak-ng)"
)
COUNTS = {
    "en": {
        "sea": {("s", "i"): 3}, "see": {("s", "i"): 1}, "she": {("S", "i"): 4}, "the": {("D", "@"): 3, ("D", "i"): 1},
        "sells": {("s", "E", "l", "z"): 2},
    },
    "zh": {"西": {("S;", "i", "55"): 2}, "思": {("s", "i", "55"): 2}, "席": {("S;", "i", "35"): 1}},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(backbone_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(backbone_folder)


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return lexicon_of(COUNTS, symbols_of(COUNTS, 1))


def said(lexicon: Lexicon, phonemes: str, language: str = "en") -> list[int]:
    """Phonemes, a space between each two, as classes; "-" is the blank."""
    return [0 if phoneme == "-" else lexicon.classes[f"{language}:{phoneme}"] for phoneme in phonemes.split()]


def sounds(lexicon: Lexicon, phonemes: str, language: str = "en") -> torch.Tensor:
    """Logits (F, classes) that are sure of one phoneme a frame."""
    return 20.0 * F.one_hot(torch.tensor(said(lexicon, phonemes, language)), len(lexicon)).float()


def pairs(lexicon: Lexicon) -> list[tuple[str, str]]:
    return list(zip(lexicon.said, lexicon.words, strict=True))


def test_a_dictionary_is_saved_and_read(lexicon: Lexicon, tmp_path: Path) -> None:
    lexicon.save(tmp_path / "lexicon.npz")
    read = Lexicon.load(tmp_path / "lexicon.npz")
    assert read.symbols == lexicon.symbols and sorted(pairs(read)) == sorted(pairs(lexicon))
    np.testing.assert_allclose(sorted(read.frequency), sorted(lexicon.frequency), atol=0.07)
    assert not list(tmp_path.glob("*.part"))
    (tmp_path / "lexicon.npz").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"lexicon\.npz cannot be read as a dictionary"):
        Lexicon.load(tmp_path / "lexicon.npz")


def test_phonemes_are_those_of_a_language(lexicon: Lexicon) -> None:
    assert lexicon.symbols[0] == "" and {"en:s", "zh:s", "zh:S;"} <= set(lexicon.symbols)
    assert lexicon.classes_of(["s", "i", "X"], "en") == said(lexicon, "s i")
    assert set(lexicon.classes_of(["s"], "zh")).isdisjoint(lexicon.classes_of(["s"], "en"))
    the = ["".join(map(chr, said(lexicon, way))) for way in ("D @", "D i")]
    assert sorted(lexicon.pronunciations("the")) == sorted(the) and lexicon.pronunciations("sky") == []


def test_rare_phonemes_have_no_class() -> None:
    counts = {"en": {"sea": {("s", "i"): 9}, "loch": {("l", "0", "x"): 1, ("l", "0", "k"): 2}}}
    found = lexicon_of(counts, symbols_of(counts, 3))
    assert found.symbols == ["", "en:0", "en:i", "en:l", "en:s"]
    assert len(found.pronunciations("loch")) == 1  # both ways are one without their last phoneme


def test_a_place_in_the_dictionary_narrows(lexicon: Lexicon) -> None:
    low, high = 0, len(lexicon.said)
    for depth, found in enumerate(said(lexicon, "s i")):
        low, high = lexicon.narrowed(low, high, depth, found)
    assert sorted(lexicon.words[low:high]) == ["sea", "see"]
    assert len(range(*lexicon.narrowed(0, len(lexicon.said), 0, len(lexicon) - 1))) in (0, 1, 2)
    assert len(range(*lexicon.narrowed(low, high, 2, 1))) == 0


def test_the_language_model_knows_words_that_sound_alike(tokenizer: PreTrainedTokenizerBase, lexicon: Lexicon) -> None:
    search = LexiconSearch(lexicon, TokenScores(tokenizer, language_model(tokenizer)))
    found = search.best(spelling_of(sounds(lexicon, "- D @ - s s i - -")))
    assert tokenizer.decode(found[0].tokens) == "the sea"
    assert search.best(spelling_of(sounds(lexicon, "- D @ - s s i - -"))) == found
    assert tokenizer.decode(search.best(spelling_of(sounds(lexicon, "S i s E l z")))[0].tokens) == "she sells"
    assert search.best(spelling_of(sounds(lexicon, "- -")))[0].tokens == ()
    assert {one.tokens for one in search.best(spelling_of(sounds(lexicon, "z z z")))} <= {()}  # no word sounds so
    careless = LexiconSearch(lexicon, TokenScores(tokenizer, language_model(tokenizer, 0.0)))
    found = careless.best(spelling_of(sounds(lexicon, "- D @ - s s i - -")))
    assert {tokenizer.decode(one.tokens) for one in found[:2]} == {"the sea", "the see"}


def test_characters_without_spaces_are_one_word(tokenizer: PreTrainedTokenizerBase, lexicon: Lexicon) -> None:
    search = LexiconSearch(lexicon, TokenScores(tokenizer, language_model(tokenizer, 0.0)))
    found = search.best(spelling_of(sounds(lexicon, "S; i 55 s i 55", "zh")))
    assert found[0].tokens == tuple(tokenizer.encode("西思", add_special_tokens=False))


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_the_best_of_all_transcripts(
    tokenizer: PreTrainedTokenizerBase, lexicon: Lexicon, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of at most three words, all of which can be scored."""
    monkeypatch.setattr("diffusion_gemma_asr.lexicon_beam.LEAST", -100.0)
    monkeypatch.setattr("diffusion_gemma_asr.lexicon_beam.BEHIND", 200.0)
    torch.manual_seed(seed)
    logits = torch.full((6, len(lexicon)), -40.0)
    likely = [0, *said(lexicon, "s i S D @")]
    logits[:, likely] = 1.5 * torch.randn(6, len(likely))
    model = language_model(tokenizer, 0.8, 0.7)

    def language(words: tuple[str, ...]) -> float:
        tokens = tokenizer.encode(" ".join(words), add_special_tokens=False)
        row = [*tokens, model.eos]
        contexts = [model.context(tokens[:i]) for i in range(len(row))]
        return float(model.weight * model.lm.logprobs(contexts, row).sum()) + WORD_BONUS * len(words)

    best: dict[tuple[str, ...], list[float]] = {}
    for size in range(4):
        for row in itertools.product(pairs(lexicon), repeat=size):
            classes = [ord(c) for way, _ in row for c in way]
            if len(classes) <= 6 and set(classes) <= set(likely):
                heard = scores(logits.log_softmax(-1), [classes])[0]
                best.setdefault(tuple(word for _, word in row), []).append(heard)
    totals = {words: float(np.logaddexp.reduce(heard)) + language(words) for words, heard in best.items()}
    winner = max(totals, key=totals.__getitem__)
    found = LexiconSearch(lexicon, TokenScores(tokenizer, model), width=2000).best(spelling_of(logits))[0]
    assert tokenizer.decode(found.tokens) == " ".join(winner)
    assert found.score == pytest.approx(totals[winner], abs=0.05)


@pytest.fixture
def search(tokenizer: PreTrainedTokenizerBase, lexicon: Lexicon) -> DraftSearch:
    return DraftSearch(Alphabet(tokenizer), TokenScores(tokenizer, language_model(tokenizer)), lexicon)


def chosen(search: DraftSearch, heard: Spellings) -> str:
    proposed = search.propose(heard, ())
    found = search.judge(heard, proposed, [0.0] * len(proposed))
    weights = SPELLED_WEIGHTS if heard.phonemes is None else WEIGHTS
    return search.language.tokenizer.decode(likeliest(found, weights))


def test_phonemes_outvote_characters_that_guess(search: DraftSearch, lexicon: Lexicon) -> None:
    characters = 0.1 * clear(search.alphabet, "the▁sha")
    phonemes = sounds(lexicon, "D @ - - s i -")
    assert chosen(search, Spellings(spelling_of(characters), spelling_of(phonemes))) == "the sea"


def test_words_that_the_dictionary_lacks_are_spelled(search: DraftSearch, lexicon: Lexicon) -> None:
    characters = clear(search.alphabet, "the▁shel-l")
    phonemes = sounds(lexicon, "D @ - - s E E l -")
    assert "shell" not in lexicon.words
    assert chosen(search, Spellings(spelling_of(characters), spelling_of(phonemes))) == "the shell"
    assert chosen(search, Spellings(spelling_of(characters), None)) == "the shell"


def test_each_word_counts_in_the_way_that_fits_best(search: DraftSearch, lexicon: Lexicon) -> None:
    """Against all ways at once."""
    tokens = tuple(search.language.tokenizer.encode("the the sea", add_special_tokens=False))
    logits = 0.2 * sounds(lexicon, "D i - D @ s i")
    heard = Spellings(spelling_of(clear(search.alphabet, "thethe▁")), spelling_of(logits))
    ways = [lexicon.pronunciations(word) for word in ("the", "the", "sea")]
    rows = [[ord(c) for c in "".join(row)] for row in itertools.product(*ways)]
    assert len(rows) == 4
    best = max(scores(logits.log_softmax(-1), rows))
    assert search.sounding(heard, tokens) == (pytest.approx(best, abs=1e-3), 0)
    assert search.sounding(heard._replace(phonemes=None), tokens) == (0.0, 0)


class Reader:
    """A model of sentences that likes one of them; what it was given to read."""

    def __init__(self, liked: str, tokenizer: PreTrainedTokenizerBase):
        self.liked, self.tokenizer, self.read = liked, tokenizer, []

    def scores(self, sentences: list[tuple[int, ...]]) -> list[float]:
        self.read = [self.tokenizer.decode(sentence) for sentence in sentences]
        return [0.0 if text == self.liked else -9.0 for text in self.read]


def test_what_reads_whole_sentences_has_the_last_word(tokenizer: PreTrainedTokenizerBase, lexicon: Lexicon) -> None:
    """Of transcripts that sound alike, and only of the best."""
    counted = language_model(tokenizer)
    heard = Spellings(
        spelling_of(0.01 * clear(Alphabet(tokenizer), "the▁sea--")), spelling_of(sounds(lexicon, "D @ - - s i -"))
    )
    for liked in ("the sea", "the see"):
        reader = Reader(liked, tokenizer)
        language = TokenScores(tokenizer, replace(counted, recurrent=cast(RecurrentLM, reader)))
        search = DraftSearch(Alphabet(tokenizer), language, lexicon)
        assert best_weights(search, heard) == FINAL_WEIGHTS
        proposed = search.propose(heard, ())
        judged, again = search.read([search.judge(heard, proposed, [0.0] * len(proposed))] * 2)
        assert tokenizer.decode(likeliest(judged, FINAL_WEIGHTS)) == liked
        assert len(judged) == len(reader.read) == min(FINALISTS, len(proposed))
        assert judged == again
    assert best_weights(DraftSearch(Alphabet(tokenizer), TokenScores(tokenizer, counted), lexicon), heard) == WEIGHTS
    assert best_weights(search, heard._replace(phonemes=None)) == SPELLED_WEIGHTS


def test_espeaks_notation_becomes_phonemes() -> None:
    assert simplified("D_,a#_t#_I_t__:__: !_'E_s_t", "en") == ["D", "a", "t", "I", "t", "E", "s", "t"]
    assert simplified("l_e-_z2 (en)_A~_g_l_'E_z_(fr)", "fr") == ["l", "e", "z", "A~", "g", "l", "E", "z"]
    assert simplified("w_'o214__| m_'@11_n__| i._55", "zh") == ["w", "o", "214", "m", "@", "11", "n", "i.", "55"]
    assert simplified("p_'a_D_**_e k_R2_*", "es") == ["p", "a", "D", "*", "e", "k", "R", "*"]


def test_words_take_their_part_of_a_sentence() -> None:
    alone = [["l", "e"], ["A~", "g", "l", "E", "z"], ["s", "O~", "t"]]
    together = ["l", "e", "z", "A~", "g", "l", "E", "z", "s", "O~"]
    assert parted(alone, together) == [("l", "e", "z"), ("A~", "g", "l", "E", "z"), ("s", "O~")]
    assert parted([["a"], ["b"]], ["b"]) == [(), ("b",)]
    assert parted([["a"], []], ["a", "c"]) in ([("a", "c"), ()], [("a",), ("c",)])


def test_a_speaker_has_an_accent() -> None:
    assert [accent_of(Utterance("x", "hi", "en", 1.0, speaker)) for speaker in ("en-gb+Andy", "1462", "")] == [
        "en-gb", "en-us", "en-us",
    ]  # fmt: skip


def frequencies(language: str, _: str) -> dict[str, float]:
    if language == "en":
        return {"diet": 0.2}
    return {"les": 0.6, "l'été": 0.3, "jean-paul": 0.2, "100": 0.1, "diet": 0.1, "là": 0.1, "l'ete": 0.05, "la": 0.09}


wordfreq = SimpleNamespace(get_frequency_dict=frequencies)


def test_frequent_words_are_those_that_plain_text_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert frequent_words("zh", 9) == {} == frequent_words("fr", 0)
    monkeypatch.setitem(sys.modules, "wordfreq", wordfreq)
    assert list(frequent_words("fr", 2)) == ["les", "l'été"]
    assert list(frequent_words("fr", 9)) == ["les", "l'été", "là", "la"]
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(DataError, match="pip install wordfreq"):
        frequent_words("fr", 2)


@needs_espeak
def test_espeak_tells_how_texts_sound() -> None:
    rows = [Utterance("x", "It's fresh!", "en", 1.0, "en-us+rob"), Utterance("y", "我", "zh", 1.0, "cmn-latn-pinyin+Lee")]
    assert pronunciations([*rows, rows[0]]) == [["I", "t", "s", "f", "r", "E", "S"], ["w", "o", "214"],
                                                ["I", "t", "s", "f", "r", "E", "S"]]  # fmt: skip


@needs_espeak
def test_a_dictionary_is_made_from_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = counted(["les amis sont là", "les gens sont là"] * 9, "fr", {"gens": 0.5, "amie": 0.5})
    assert {"".join(way) for way in found["les"]} == {"le", "lez"}
    size = 8 * 9
    assert found["amis"].total() == 9 and found["amie"].total() == BESIDE * 0.5 * size
    assert found["gens"].total() == 9 + BESIDE * 0.5 * size
    (tmp_path / "fr.txt").write_text("les gens sont là\n" + "une amie\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fr.txt").write_text("une amie\n")
    monkeypatch.setattr("diffusion_gemma_asr.train.lexicon.LEAST", 1)
    files = [tmp_path / "fr.txt"], [tmp_path / "out" / "fr.txt"]
    lexicon = make_lexicon(*files, 0)
    assert set(lexicon.words) == {"les", "gens", "sont", "là"}
    monkeypatch.setitem(sys.modules, "wordfreq", wordfreq)
    longer = make_lexicon(*files, 2, lexicon)
    assert longer.symbols == lexicon.symbols
    assert set(longer.words) == {"les", "gens", "sont", "là", "l'été"}
