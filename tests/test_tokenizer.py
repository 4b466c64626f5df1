"""train/tokenizer.py: ids where Gemma has them, any text there and back, and no token across words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diffusion_gemma_asr.data.manifest import Utterance, write_manifest
from diffusion_gemma_asr.errors import DataError, RecipeError
from diffusion_gemma_asr.model.prompt import LANGUAGES, SPECIAL_TOKENS, PromptBuilder, instruction
from diffusion_gemma_asr.train.mini.tokenizer import FIRST_WORD_TOKEN, read_sentences, saved, train_tokenizer
from diffusion_gemma_asr.train.run import train_from_recipe

PATIENT = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "she sells sea shells by the sea shore",
    "it's a pleasure to meet you how do you do",
    "pack my box with five dozen liquor jugs",
    "seven eight nine ten and then we start again",
]
SIZE = 400  # fewer than these sentences have to teach
plain = st.lists(st.from_regex(r"[a-z]+('[a-z]+)?", fullmatch=True), min_size=1, max_size=8).map(" ".join)
anything = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])).filter(
    lambda text: not any(token in text for token in [*SPECIAL_TOKENS.values(), "<unk>"])
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    saved(train_tokenizer({"en": SENTENCES * 100}, SIZE), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """As everyone else gets it: from the folder."""
    return AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_the_first_ids_are_gemmas(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>"]) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert len(tokenizer) == SIZE


def test_a_special_token_is_one_id_wherever_it_stands(tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = tokenizer.get_vocab()
    for token in SPECIAL_TOKENS.values():
        assert encode(tokenizer, token) == [vocabulary[token]]
        around = encode(tokenizer, f"dog{token}fox")
        assert around == [*encode(tokenizer, "dog"), vocabulary[token], *encode(tokenizer, "fox")]
    assert tokenizer.decode(encode(tokenizer, "the<turn|><eos>"), skip_special_tokens=True) == "the"


def test_words_begin_where_the_text_stage_expects_them(tokenizer: PreTrainedTokenizerBase) -> None:
    """Below are special tokens and bytes, which nothing may look like."""
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert all(name.startswith("<") and name.endswith(">") for name in names[:FIRST_WORD_TOKEN])
    assert not any(name.startswith("<") for name in names[FIRST_WORD_TOKEN:])
    assert names.index("<0xFF>") < FIRST_WORD_TOKEN


@PATIENT
@given(plain)
@example("it's the lazy dog's box")
def test_plain_english_there_and_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text == tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.unk_token_id not in ids


@PATIENT
@given(anything)
@example("stra\u00dfe, \u4f60\u597d \U0001f600!")
@example(" two  spaces ")
@example("\n\x00\t")
@example("<0x41>")
def test_any_text_there_and_back_by_its_bytes(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """But for special tokens, and for "\u2581", which stands for a space inside."""
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text  # bytes are no special tokens


def test_no_token_reaches_across_words(tokenizer: PreTrainedTokenizerBase) -> None:
    assert all("\u2581" not in name[1:] for name in tokenizer.get_vocab())
    for sentence in SENTENCES:
        words = [encode(tokenizer, word) for word in sentence.split()]
        assert encode(tokenizer, sentence) == [i for word in words for i in word]


def test_common_words_are_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(encode(tokenizer, "the")) == 1
    for sentence in SENTENCES:
        assert len(encode(tokenizer, sentence)) < len(sentence) / 2


def test_the_prompt_is_learnt_with_enough_text(tmp_path: Path) -> None:
    """Words of the prompt that no sentence holds get tokens of their own."""
    tokenizer = saved(train_tokenizer({"en": SENTENCES * 2000}, 600), tmp_path)
    row = encode(tokenizer, instruction(LANGUAGES["en"]))
    assert len(row) <= 6  # "Transcribe the English speech.": 30 characters


def test_a_prompt_builder_takes_it(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = PromptBuilder(tokenizer)
    assert prompts.row(3).count(prompts.special["audio"]) == 3
    assert prompts.target("the dog") == [*encode(tokenizer, "the dog"), prompts.special["end_of_turn"]]


def test_training_is_deterministic(tmp_path: Path, folder: Path) -> None:
    saved(train_tokenizer({"en": SENTENCES * 100}, SIZE), tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_languages_count_alike_however_much_text_there_is(tmp_path: Path) -> None:
    """A hundred times as much English leaves German its words."""
    text = {"en": SENTENCES * 100, "de": ["der schnelle fuchs springt über den faulen hund"]}
    tokenizer = saved(train_tokenizer(text, 420), tmp_path)
    assert len(encode(tokenizer, "schnelle")) <= 2 and len(encode(tokenizer, "quick")) <= 2


def test_rare_characters_are_spelled_in_bytes(tmp_path: Path) -> None:
    tokenizer = saved(train_tokenizer({"zh": ["你好"] * 50 + ["龘"]}, 420, alphabet=3), tmp_path)  # with the mark of a word
    assert any(token.startswith("<0x") for token in tokenizer.tokenize("龘"))
    assert tokenizer.decode(encode(tokenizer, "你好龘")) == "你好龘"


def test_each_character_of_mandarin_is_a_token(tmp_path: Path) -> None:
    """However often two of them stand together."""
    tokenizer = saved(train_tokenizer({"zh": ["你好世界"] * 500, "en": SENTENCES}, 500), tmp_path)
    assert len(encode(tokenizer, "你好世界")) == 5  # with the mark of a word
    assert tokenizer.decode(encode(tokenizer, "你好世界 the 世界")) == "你好世界 the 世界"


def test_the_stage_is_done_once(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("\n".join(SENTENCES * 100), encoding="utf-8")
    recipe = tmp_path / "tokenizer.yaml"
    recipe.write_text(f"stage: tokenizer\nname: tokens\ntext: [en.txt]\nvocab_size: {SIZE}\n", encoding="utf-8")
    folder = train_from_recipe(recipe, tmp_path / "run", "cpu")
    assert folder == tmp_path / "run" and len(AutoTokenizer.from_pretrained(folder)) == SIZE
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert train_from_recipe(recipe, tmp_path / "run", "cpu") == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    recipe.write_text("stage: tokenizer\nname: tokens\ntext: [en.txt]\nvocab_size: 9\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"tokenizer\.yaml: 'vocab_size' must be above"):
        train_from_recipe(recipe, tmp_path / "run", "cpu")


def test_sentences_are_read_from_texts_and_manifests(tmp_path: Path) -> None:
    (tmp_path / "de.txt").write_text("Guten Tag!\nGuten Tag.\nIm Jahr 1984.\n", encoding="utf-8")
    rows = [Utterance(str(tmp_path / "a.wav"), "Straße", "de", 1.0), Utterance(str(tmp_path / "b.wav"), "Yes.", "en", 1.0)]
    write_manifest(tmp_path / "speech.jsonl", rows)
    found = read_sentences([tmp_path / "de.txt", tmp_path / "speech.jsonl"])
    assert found == {"de": ["guten tag", "straße"], "en": ["yes"]}
    for name in ("gone/de.txt", "xx.txt"):
        with pytest.raises(DataError, match=r"give a file CODE\.txt, CODE one of en, de"):
            read_sentences([tmp_path / name])
