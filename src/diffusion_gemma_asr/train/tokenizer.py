"""A small Gemma-like tokenizer: byte-pair encoding over words with a leading space mark, bytes for everything else."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from ..data.text import plain_english
from ..prompt import LANGUAGES, SPECIAL_TOKENS, instruction

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FIRST_WORD_TOKEN = len(SPECIAL_TOKENS) + 1 + len(BYTES)  # behind the special tokens, <unk> and the bytes


def train_tokenizer(sentences: Iterable[str], vocab_size: int, folder: str | Path) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on sentences and saves it as `tokenizer.json` in `folder`.

    Ids 0 to 2 are pad, eos and bos as in Gemma, then the other special tokens and 256 bytes; the rest is learnt.
    """
    special = [*SPECIAL_TOKENS.values()]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[*special, "<unk>", *BYTES], show_progress=False)
    # Single words (the normaliser marks them): merges never cross words. The prompt gets tokens of its own.
    words = [word for sentence in sentences for word in sentence.split()]
    prompt = [word for language in LANGUAGES.values() for word in instruction(language).split()]
    tokenizer.train_from_iterator(words + prompt * (len(words) // 2000), trainer)
    # The trainer makes the bytes special tokens, which decoding skips: leave them ordinary tokens of the model.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in [*special, "<unk>"]])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        extra_special_tokens=special[3:],
    )  # fmt: skip
    fast.save_pretrained(folder)
    return fast


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the mini tokenizer.")
    parser.add_argument("text", help="sentences, one a line; English is made plain first")
    parser.add_argument("folder")
    parser.add_argument("--vocab_size", type=int, default=3072)
    args = parser.parse_args()
    lines = Path(args.text).read_text(encoding="utf-8").splitlines()
    train_tokenizer(dict.fromkeys(plain_english(line) for line in lines), args.vocab_size, args.folder)
