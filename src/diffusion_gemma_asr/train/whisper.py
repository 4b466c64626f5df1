"""Stage 2 of the mini model: a small Whisper, whose encoder is then frozen.

The encoder learns from up to four sides at once: the autoregressive decoder's cross-entropy, as Whisper does; a
character CTC on its 20 ms frames (hybrid CTC/attention, Watanabe et al. 2017); a CTC over the tokenizer's tokens,
through the projector that stage 3 goes on with and the frozen lm_head of stage 1, so that the frames hold what 160 ms
slots have to say; and, on synthetic speech, the phoneme of every frame, which espeak-ng knows. Without the last three
so small a model takes far longer to find out which sound belongs to which text. The two heads on the frames are thrown
away; the decoder, where it was trained, is kept as the yardstick.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import jiwer
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from ..backbone import Backbone
from ..baselines.whisper_decoder import write_from_frames
from ..checkpoint import read_projector, save_projector
from ..ctc import lm_head_ctc_loss, lm_head_draft
from ..data.augment import Masking, log_uniform, mask_bands, warp_frequencies
from ..data.batches import Mixture
from ..data.manifest import Utterance, read_manifest
from ..data.synth import read_sound
from ..data.text import plain_text
from ..encoder import AcousticEncoder
from ..errors import CheckpointError
from ..projector import AudioProjector
from .adapter import first_of
from .loop import LoopOptions, Metrics, load_weights, run
from .monitor import error_rate
from .workers import join_workers, rank

LOSSES = ("autoregressive", "characters", "tokens", "phonemes")


class HybridWhisper(nn.Module):
    """Whisper with CTC and phoneme heads on its encoder, run over the frames that hold sound.

    Args:
        config: of the Whisper.
        alphabet: characters of the character head; the first one stands for nothing, the CTC blank.
        phonemes: classes of the phoneme head.
        backbone: frozen; the projector's slots are read by its lm_head, and are as large as its embeddings.
        projector_size: channels between the projector's convolutions.
    """

    lm_head: Tensor

    def __init__(self, config: WhisperConfig, alphabet: str, phonemes: int, backbone: Backbone, projector_size: int):
        super().__init__()
        self.alphabet = alphabet
        self.whisper = WhisperForConditionalGeneration(config)
        self.acoustic = AcousticEncoder(
            self.whisper.model.encoder, WhisperFeatureExtractor(feature_size=config.num_mel_bins)
        )
        self.ctc_head = nn.Linear(config.d_model, len(alphabet))
        self.phoneme_head = nn.Linear(config.d_model, phonemes)
        scale = backbone.embedding_scale()
        self.projector = AudioProjector(config.d_model, backbone.hidden_size, projector_size, scale)
        self.register_buffer("lm_head", backbone.lm_head_weight.detach().clone())
        self.softcap = backbone.softcap

    def trained(self) -> dict[str, nn.Parameter]:
        """All parameters but the encoder's sinusoids."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def losses(
        self, mel: Tensor, lengths: Tensor, tokens: Tensor, characters: list[list[int]], phonemes: Tensor,
        wanted: Collection[str] = LOSSES,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The losses of a batch, by the names of the recipe's weights.

        Args:
            mel: (B, bins, T); lengths: (B,) mel frames.
            tokens: (B, L) bos, transcript, eos, then -100.
            characters: transcript of each row as indices into the alphabet.
            phonemes: (B, F) index of each frame's phoneme, -100 where it is not known.
            wanted: those to compute.

        Returns:
            autoregressive: cross-entropy a token; characters, tokens: CTC loss a character and a token; phonemes:
            cross-entropy a frame (0 where no phoneme is known).
        """
        frames, frame_lengths = self.acoustic(mel, lengths)
        found: dict[str, Tensor] = {}
        if "autoregressive" in wanted:
            hidden = self.whisper.model.decoder(
                input_ids=tokens[:, :-1].clamp(min=0), encoder_hidden_states=frames
            ).last_hidden_state
            logits = self.whisper.proj_out(hidden)  # (B, L-1, V)
            found["autoregressive"] = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-100)
        if "characters" in wanted:
            log_probs = self.ctc_head(frames).log_softmax(-1).transpose(0, 1)  # (F, B, characters)
            sizes = torch.tensor([len(c) for c in characters])
            flat = torch.tensor([index for row in characters for index in row])
            found["characters"] = F.ctc_loss(log_probs, flat, frame_lengths, sizes, zero_infinity=True)
        if "tokens" in wanted:
            slots, slot_lengths = self.projector(frames, frame_lengths)
            written = tokens[:, 1:].clamp(min=0)
            counts = (tokens >= 0).sum(1) - 2  # without bos and eos
            blank = self.whisper.config.pad_token_id
            found["tokens"] = lm_head_ctc_loss(slots, self.lm_head, self.softcap, written, slot_lengths, counts, blank)
        if "phonemes" in wanted:
            known = phonemes >= 0
            zero = frames.new_zeros(())
            found["phonemes"] = F.cross_entropy(self.phoneme_head(frames)[known], phonemes[known]) if known.any() else zero
        return found

    @torch.no_grad()
    def readings(
        self, mel: Tensor, lengths: Tensor, tokenizer: PreTrainedTokenizerBase, wanted: Collection[str] = LOSSES
    ) -> dict[str, list[str]]:
        """Greedy transcripts of a batch by what is trained: the CTC over characters, the one over tokens, the decoder."""
        frames, frame_lengths = self.acoustic(mel, lengths)
        found: dict[str, list[str]] = {}
        if "characters" in wanted:
            best = self.ctc_head(frames).argmax(-1)  # (B, F)
            rows = [torch.unique_consecutive(row[:n]).tolist() for row, n in zip(best, frame_lengths, strict=True)]
            found["character"] = ["".join(self.alphabet[i] for i in row if i).strip() for row in rows]
        if "tokens" in wanted:
            slots, slot_lengths = self.projector(frames, frame_lengths)
            blank = self.whisper.config.pad_token_id
            drafts = lm_head_draft(slots, self.lm_head, self.softcap, slot_lengths, blank)
            ids = [[token.id for token in draft] for draft in drafts]
            found["token"] = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        if "autoregressive" in wanted:
            written = write_from_frames(self.whisper, frames)
            found["decoder"] = [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
        return found


def warm_start(model: HybridWhisper, folder: str | Path) -> None:
    """Takes encoder and projector from a checkpoint that holds both, such as the bundled one; decoder and heads stay new.

    A narrower projector is widened without changing what it computes: its weights fill the first channels, and nothing
    reads the new ones yet (Chen et al. 2016, "Net2Net").

    Raises:
        CheckpointError: the folder lacks encoder or adapter, the encoder is of another shape, or the projector is wider than
            the model's.
    """
    encoder = AcousticEncoder.from_pretrained(Path(folder) / "encoder").encoder
    load_weights(dict(model.acoustic.encoder.named_parameters()), dict(encoder.named_parameters()), folder)
    saved = read_projector(folder)
    projector = model.projector
    old, new = saved["conv1.weight"].shape[0], projector.conv1.weight.shape[0]
    if old > new:
        raise CheckpointError(f"{folder}: its projector has {old} channels, the recipe's {new}; set projector_size to {old}")
    with torch.no_grad():
        projector.conv2.weight[:, old:] = 0.0
        projector.linear.weight[:, old:] = 0.0
        for name, parameter in projector.named_parameters():
            value = saved[name]
            parameter[tuple(slice(size) for size in value.shape)] = value


class PhonemeTimes:
    """Which phoneme is spoken when, from the phonemes.jsonl of synthetic corpora (see data/synth.py).

    `symbols` are all that occur, sorted: their order, and so the classes of the phoneme head, depends on the data alone.
    """

    def __init__(self, files: Sequence[str | Path]):
        self._spans: dict[str, list[tuple[str, float, float]]] = {}
        for file in files:
            for line in Path(file).read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._spans[os.path.abspath(os.path.join(Path(file).parent, row["audio_filepath"]))] = row["phonemes"]
        self.symbols = sorted({symbol for spans in self._spans.values() for symbol, _, _ in spans})
        self._index = {symbol: i for i, symbol in enumerate(self.symbols)}

    def frames(self, utterance: Utterance, count: int) -> Tensor:
        """(count,) index of the phoneme at the middle of each 20 ms frame; -100 between phonemes or where none is known."""
        labels = torch.full((count,), -100)
        for symbol, start, end in self._spans.get(utterance.audio_filepath, ()):
            labels[max(0, round(start / 0.02)) : round(end / 0.02)] = self._index[symbol]
        return labels


def whisper_config(tokenizer: PreTrainedTokenizerBase, **sizes: int) -> WhisperConfig:
    """A Whisper configuration that writes the mini tokenizer's tokens."""
    return WhisperConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.bos_token_id, max_target_positions=256,
        suppress_tokens=[], begin_suppress_tokens=[], **sizes,
    )  # fmt: skip


def train_whisper(recipe: dict, folder: Path, start_from: str | Path | None = None) -> None:
    """Trains by a stage recipe, from nothing or from what `warm_start` finds in `start_from`.

    Writes the encoder to `folder/encoder`, the projector as an adapter without LoRA to `folder/projector` and, if its
    decoder was trained, the whole Whisper to `folder/whisper`.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    data = recipe["data"]
    lists = [
        first_of(read_manifest(item["manifest"], (), data["max_duration_s"]), item.get("first")) for item in data["train"]
    ]
    train = [u for rows in lists for u in rows]
    texts = [plain_text(u.text, u.language) for u in train]
    alphabet = "\0" + "".join(sorted({character for text in texts for character in text}))
    dev = {name: read_manifest(path, (), data["max_duration_s"])[: data["dev_count"]] for name, path in data["dev"].items()}
    phonemes = PhonemeTimes([item["phonemes"] for item in data["train"] if "phonemes" in item])
    torch.manual_seed(recipe["loop"]["seed"])
    backbone = Backbone.from_pretrained(folder / "backbone")
    config = whisper_config(tokenizer, **recipe["model"])
    model = HybridWhisper(config, alphabet, len(phonemes.symbols), backbone, recipe["projector_size"])
    if start_from is not None:
        warm_start(model, start_from)
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokens = [[ends[0], *tokenizer.encode(text, add_special_tokens=False), ends[1]] for text in texts]
    index = {character: i for i, character in enumerate(alphabet)}
    characters = [[index[character] for character in text] for text in texts]
    mixture = Mixture(
        [len(rows) for rows in lists], [item["weight"] for item in data["train"]],
        [round(100 * u.duration) for u in train], recipe["batch_frames"], 256, recipe["loop"]["seed"],
    )  # fmt: skip
    masking = Masking(**recipe["masking"])
    wanted = [name for name in LOSSES if recipe["weights"][name] > 0]
    model.acoustic.encoder.embed_positions.requires_grad_(False)

    def hear(utterances: Sequence[Utterance]) -> tuple[Tensor, Tensor]:
        return model.acoustic.features([read_sound(u.audio_filepath) for u in utterances])

    options = LoopOptions(**recipe["loop"])

    def loss_of(step: int, micro: int) -> tuple[Tensor, Metrics]:
        model.train()
        chosen = mixture.at(step * options.accumulation + micro)
        mel, lengths = hear([train[i] for i in chosen])
        factors = log_uniform(recipe["warp"], len(chosen))
        mel = mask_bands(warp_frequencies(mel.transpose(1, 2), factors), lengths, masking).transpose(1, 2)
        rows = nn.utils.rnn.pad_sequence([torch.tensor(tokens[i]) for i in chosen], True, -100)
        frames = [phonemes.frames(train[i], (n + 1) // 2) for i, n in zip(chosen, lengths.tolist(), strict=True)]
        labels = nn.utils.rnn.pad_sequence(frames, True, -100)
        spelled = [characters[i] for i in chosen]
        losses = model.losses(mel, lengths, rows, spelled, labels, wanted)
        loss = torch.stack([recipe["weights"][name] * value for name, value in losses.items()]).sum()
        return loss, {name: value.item() for name, value in losses.items()} | {"audio_s": float(lengths.sum()) / 100}

    def evaluate(step: int) -> Metrics:
        model.eval()
        figures = {}
        for name, rows in dev.items():
            read: dict[str, list[str]] = {}
            for i in range(0, len(rows), 20):
                for reading, texts in model.readings(*hear(rows[i : i + 20]), tokenizer, wanted).items():
                    read.setdefault(reading, []).extend(texts)
            language = rows[0].language
            references = [plain_text(u.text, language) for u in rows]
            for reading, texts in read.items():
                figures[f"{reading}_cer_{name}"] = round(jiwer.cer(references, texts), 4)
                figures[f"{reading}_wer_{name}"] = round(error_rate(references, texts, language), 4)
            for row in list(zip(references, *read.values(), strict=True))[:3]:
                print(f"step {step} {name}: " + " | ".join(row))
        print(figures, flush=True)
        return figures

    start = time.time()
    run(model.trained(), loss_of, folder / "whisper-run", options, evaluate)
    if rank() > 0:
        return
    if "autoregressive" in wanted:
        for part in (model.whisper, model.acoustic.extractor, tokenizer):
            part.save_pretrained(folder / "whisper")
    save_encoder(model.acoustic, folder / "encoder")
    save_projector(model.projector, folder / "projector")
    print(
        json.dumps(
            {
                "stage": "whisper",
                "hours_of_sound": sum(u.duration for u in train) / 3600,
                "minutes": (time.time() - start) / 60,
            }
        )
    )


def save_encoder(acoustic: AcousticEncoder, folder: Path) -> None:
    """Writes an encoder alone, in float16, in Whisper's layout (`model.encoder.*` keys)."""
    state = {f"model.encoder.{name}": value.half() for name, value in acoustic.encoder.state_dict().items()}
    config = acoustic.encoder.config
    shell = WhisperForConditionalGeneration(config)
    shell.save_pretrained(folder, state_dict=state)
    acoustic.extractor.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the mini model's Whisper (stage 2).")
    parser.add_argument("recipe", help="stage recipe, YAML")
    parser.add_argument("folder", help="run folder that holds tokenizer/ and backbone/")
    parser.add_argument("--start_from", help="checkpoint folder whose encoder and projector to go on with")
    args = parser.parse_args()
    join_workers()
    train_whisper(yaml.safe_load(Path(args.recipe).read_text(encoding="utf-8")), Path(args.folder), args.start_from)
