"""The whole system: frozen ear, trained projector, frozen denoiser with LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .audio import SAMPLE_RATE, AudioSource
from .backbone import Backbone, Prefill
from .beam import DraftLM
from .ctc import DraftToken, TokenSpan, lm_head_align, lm_head_ctc_loss, lm_head_draft
from .decoding import Decoded, Decoding, EngineName, OnStep, Start
from .denoise import DenoiseOptions
from .draft_prior import Heard, hear
from .draft_search import DraftSearch, spelled_drafts
from .ear import Ear
from .edits import EditCanvases, edit_canvases
from .errors import AsrError, DataError
from .lexicon import Lexicon
from .objective import BackboneLosses, SpeechBatch, TextBatch, backbone_losses
from .projector import Projector
from .prompt import AUTO, LANGUAGES, PromptBuilder, fill_slots
from .results import Segment, Transcript, Word
from .speller import Alphabet, spelling_loss
from .token_scores import TokenScores
from .transcribe import stream, transcribe
from .vad import Chunk, speech_chunks
from .words import timed_words


class DiffusionGemmaASR(nn.Module):
    """Speech in, transcript out.

    Args:
        encoder, backbone: frozen.
        projector: trained; its widths must fit both.
        tokenizer: the backbone's.
        drafts: whether the projector was trained by CTC, so that its slots spell a draft through lm_head.
        start: what a canvas holds at first where the caller does not say: "noise", or the CTC "draft", laid out so that
            it can be corrected in place (see edits.py).
        languages: codes that it was trained for.
        finds_language: whether it was also trained to find out which of them is spoken ("auto").
        reads_context: whether it was trained with context in the prompt.
        draft_weight: factor on CTC's log-probabilities, which are added to the denoiser's logits on canvases that start from
            the draft (see draft_prior.py); 0: they are not.
        lm: language model that takes part in drafts that canvases start from (see beam.py); None: drafts are greedy.
        lexicon: pronouncing dictionary of the phonemes that a speller writes; None: it writes none.
    """

    def __init__(
        self,
        encoder: Ear,
        projector: Projector,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        drafts: bool = True,
        start: Start = "noise",
        languages: Sequence[str] = ("en",),
        finds_language: bool = False,
        reads_context: bool = False,
        draft_weight: float = 0.0,
        lm: DraftLM | None = None,
        lexicon: Lexicon | None = None,
    ):
        super().__init__()
        self.encoder, self.projector, self.backbone = encoder, projector, backbone
        self.tokenizer = tokenizer
        self.prompts = PromptBuilder(tokenizer)
        self.drafts, self.start = drafts, start
        self.languages, self.finds_language = tuple(languages), finds_language
        self.reads_context, self.draft_weight = reads_context, draft_weight
        self.lm, self.lexicon = lm, lexicon
        self._search: DraftSearch | None = None  # with this language model; made when it is needed

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.backbone.device

    @property
    def slot_s(self) -> float:
        """Seconds of sound that one audio token stands for."""
        return self.encoder.frame_s * self.projector.frames_per_slot

    @property
    def blank(self) -> int:
        """The CTC blank: the pad token."""
        return self.prompts.special["pad"]

    def trained(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds and training changes: the projector and the LoRA matrices."""
        return {name: p for name, p in self.named_parameters() if name.startswith("projector.") or "lora_" in name}

    # -- sound to slots -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_audio(self, audio: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Clips → audio tokens.

        Args:
            audio: float32 arrays (n,), 16 kHz, at most 30 s each.

        Returns:
            slots (B, S, H), one per `slot_s`, zeros behind each end; slot_lengths (B,).
        """
        return self.listen(*self._frames(audio), drafts=False)[:2]

    def _frames(self, audio: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        mel, lengths = self.encoder.features(audio)
        return self.encoder(mel.to(self.device), lengths.to(self.device))

    @torch.no_grad()
    def listen(
        self, frames: Tensor, frame_lengths: Tensor, drafts: bool = True
    ) -> tuple[Tensor, Tensor, list[list[DraftToken]] | None]:
        """Encoder frames → audio tokens, and drafts for canvases.

        Args:
            frames: (B, F, D); frame_lengths: (B,).
            drafts: whether drafts are wanted.

        Returns:
            slots (B, S, H), slot_lengths (B,), and what the speller finds with the language model, if there is one, as
            `transcribe_slots` takes it; None without a speller.
        """
        frames = frames.to(self.projector.linear.weight.dtype)
        slots, slot_lengths = self.projector(frames, frame_lengths)
        if self.projector.speller is None or not drafts:
            return slots, slot_lengths, None
        heard = self.projector.speller.hear(frames, frame_lengths)
        return slots, slot_lengths, spelled_drafts(self, heard, frame_lengths, slots, slot_lengths)

    @cached_property
    def alphabet(self) -> Alphabet:
        """What a speller writes in; a large vocabulary takes a second to look through."""
        return Alphabet(self.tokenizer)

    @property
    def search(self) -> DraftSearch | None:
        """For the transcripts of a speller, with the language model, if there is one."""
        if self.lm is None:
            return None
        if self._search is None or self._search.language.model is not self.lm:
            self._search = DraftSearch(self.alphabet, TokenScores(self.tokenizer, self.lm), self.lexicon)
        return self._search

    def draft(self, slots: Tensor, slot_lengths: Tensor) -> list[list[DraftToken]]:
        """Greedy CTC transcripts of the slots, straight through lm_head."""
        weight, softcap = self.backbone.lm_head_weight, self.backbone.softcap
        return lm_head_draft(slots, weight, softcap, slot_lengths, self.blank)

    def hear(self, slots: Tensor) -> Heard:
        """All that CTC finds likely in each slot, the drafts among it."""
        return hear(slots, self.backbone.lm_head_weight, self.backbone.softcap, self.blank)

    def read_prompts(
        self, slots: Tensor, slot_lengths: Tensor, languages: Sequence[str], written: Sequence[Sequence[int]] | None = None,
        context: str = "",
    ) -> tuple[Prefill, Tensor]:  # fmt: skip
        """Reads prompts, the placeholders overwritten by the slots; see `PromptBuilder.build` and `Backbone.prefill`."""
        prompt = self.prompts.build(slot_lengths.tolist(), languages, written, context)
        ids, slot_mask = prompt.ids.to(self.device), prompt.slot_mask.to(self.device)
        embeds = fill_slots(self.backbone.embed(ids), slot_mask, slots, slot_lengths)
        return self.backbone.prefill(embeds, prompt.mask.to(self.device))

    # -- training -----------------------------------------------------------------------------------------------------

    def losses(
        self,
        batch: SpeechBatch,
        self_conditioning: float = 0.5,
        full_noise: float = 0.0,
        autoregressive: bool = True,
        draft_share: float = 0.0,
        unroll: float = 0.0,
    ) -> tuple[BackboneLosses, Tensor]:
        """The three losses of a batch; see `backbone_losses` for the options.

        Returns:
            the diffusion and autoregressive losses, and the CTC loss a token.
        """
        slots, slot_lengths = self.projector(batch.frames, batch.frame_lengths)
        text = batch.text
        embeds = fill_slots(self.backbone.embed(text.ids), text.slot_mask, slots, slot_lengths)
        drafts = None
        if draft_share > 0:
            drafts = self._edits(self._training_drafts(batch, slots, slot_lengths), text)
        found = backbone_losses(
            self.backbone, embeds, text, self_conditioning, full_noise, autoregressive=autoregressive, drafts=drafts,
            draft_share=draft_share, unroll=unroll,
        )  # fmt: skip
        return found, self._ctc_loss(slots, slot_lengths, text)

    def _training_drafts(self, batch: SpeechBatch, slots: Tensor, slot_lengths: Tensor) -> list[list[int]]:
        """Greedy drafts, the speller's if there is one: the language model knows the text that is trained on by heart."""
        speller = self.projector.speller
        if speller is None:
            return [_ids(row) for row in self.draft(slots, slot_lengths)]
        texts = self.alphabet.read(speller.hear(batch.frames, batch.frame_lengths).characters, batch.frame_lengths)
        return [self.prompts.target(text)[:-1] for text in texts]

    def ctc_loss(self, batch: SpeechBatch) -> Tensor:
        """The CTC loss a token alone, which does not need the backbone's layers."""
        slots, slot_lengths = self.projector(batch.frames, batch.frame_lengths)
        return self._ctc_loss(slots, slot_lengths, batch.text)

    def spelling_losses(self, batch: SpeechBatch) -> dict[str, Tensor]:
        """The CTC losses a character and a phoneme of a projector that has a speller."""
        speller = self.projector.speller
        assert speller is not None
        characters, phonemes = speller(batch.frames, batch.frame_lengths)
        targets = self.alphabet.targets(*batch.text.spoken())
        found = {"spelling": spelling_loss(characters, batch.frame_lengths, targets)}
        if batch.phonemes and phonemes is not None:
            found["phonemes"] = spelling_loss(phonemes, batch.frame_lengths, batch.phonemes)
        return found

    def _ctc_loss(self, slots: Tensor, slot_lengths: Tensor, text: TextBatch) -> Tensor:
        weight, softcap = self.backbone.lm_head_weight, self.backbone.softcap
        spoken, counts = text.spoken()
        with torch.autocast(weight.device.type, enabled=False):  # logits in the head's own precision
            return lm_head_ctc_loss(slots.to(weight.dtype), weight, softcap, spoken, slot_lengths, counts, self.blank)

    def _edits(self, drafts: Sequence[Sequence[int]], text: TextBatch) -> EditCanvases:
        """What the drafts have to become, on the model's device."""
        special = self.prompts.special
        spoken, counts = text.spoken()
        targets = [row[:n] for row, n in zip(spoken.tolist(), counts.tolist(), strict=True)]
        leads = [row[:n] for row, n in zip(text.canvas.tolist(), text.leads.tolist(), strict=True)]
        ending = special["end_of_turn"], special["eos"]
        found = edit_canvases(drafts, targets, ending, self.blank, text.canvas.shape[1], leads)
        return EditCanvases(*(part.to(self.device) for part in found))

    # -- transcription ------------------------------------------------------------------------------------------------

    def transcribe(self, audio: AudioSource, **options: Any) -> Transcript:
        """Transcribes a recording of any length; see `transcribe.transcribe`."""
        return transcribe(audio, self, **options)

    @torch.no_grad()
    def align(self, audio: np.ndarray, text: str, language: str = "en") -> tuple[Word, ...]:
        """When the words of a known text are said.

        Args:
            audio: (n,) float32, 16 kHz, at most 30 s.
            text: what is said, as the model would write it.

        Returns:
            its words, with times in seconds and the probability that CTC gives them.

        Raises:
            DataError: CTC cannot place so many tokens in so short a sound.
        """
        slots, counts = self.encode_audio([audio])
        tokens = self.prompts.target(text)[:-1]  # without the end of the turn
        spans = self.align_tokens(slots[0], tokens)
        if spans is None:
            raise DataError(f"{len(tokens)} tokens of text do not fit into {int(counts[0])} audio tokens; give less text")
        speech = list(speech_chunks([audio]))
        bounds = (speech[0].start, speech[-1].end) if speech else (0.0, len(audio) / SAMPLE_RATE)
        chunk = Chunk(0.0, audio, *bounds, speech_prob=1.0)
        return timed_words(tokens, [span.logprob for span in spans], spans, chunk, self.text, language, self.slot_s)

    def stream(self, audio: AudioSource, **options: Any) -> Iterator[Segment]:
        """Transcribes a recording of any length, segment by segment; see `transcribe.stream`."""
        return stream(audio, self, **options)

    @torch.no_grad()
    def transcribe_batch(
        self,
        audio: Sequence[np.ndarray],
        language: str | Sequence[str] = "en",
        options: DenoiseOptions | int | None = None,
        seed: int = 0,
        canvas_length: int | None = None,
        on_step: OnStep | None = None,
        start: Start | None = None,
        engine: EngineName = "fast",
        rows: int = 32,
        on_done: Callable[[int], None] | None = None,
        align: bool = False,
        among: Sequence[str] | None = None,
        context: str = "",
    ) -> list[Decoded]:
        """Transcribes clips; each gives the same whatever else is in the batch.

        Args:
            audio: float32 arrays (n,), 16 kHz, at most 30 s each, as many as there are.
            language: code of one of the six, or one code a clip; "auto" finds out, and `Decoded.language` says what. A model
                of one language takes that for "auto".
            options: how to denoise; a number is so many steps at most (None: 8), and the rest as the backbone's
                generation_config.json says.
            seed: of each clip's own generator.
            canvas_length: positions on the canvas; by default as many as the draft suggests. A transcript that fills its
                canvas goes on on another one.
            on_step: called before the first denoising step, with 0, and after every one, with its number, and what is on the
                canvases of the clips that are denoised together, token by token; the reference engine does it.
            start: "noise" or "draft"; None is the model's own.
            engine: "fast", or "reference" for the plain loop; see engine.py.
            rows: clips that the encoder and the decoder take at once.
            on_done: called with a clip's index when its transcript is there.
            align: whether to find out where in the sound the tokens are.
            among: codes that "auto" may find; None: all that the model was trained for.
            context: what the prompt says beside the instruction, see `prompt.context_of`.

        Raises:
            AsrError: "auto" or context, and the model was not trained to find the language or to read context.
        """
        order = sorted(range(len(audio)), key=lambda i: len(audio[i]))
        slots: dict[int, Tensor] = {}
        drafts: dict[int, list[DraftToken]] = {}
        for first in range(0, len(order), rows):
            taken = order[first : first + rows]
            frames, frame_lengths = self._frames([audio[i] for i in taken])
            encoded, lengths, found = self.listen(frames, frame_lengths, (start or self.start) == "draft")
            slots.update((i, row[:n]) for i, row, n in zip(taken, encoded, lengths.tolist(), strict=True))
            drafts.update(zip(taken, found or (), strict=found is not None))
        padded = nn.utils.rnn.pad_sequence([slots[i] for i in range(len(audio))], batch_first=True)
        slot_lengths = torch.tensor([len(slots[i]) for i in range(len(audio))], device=self.device)
        decoded = self.transcribe_slots(
            padded, slot_lengths, language, options, seed, canvas_length, on_step, start, engine, rows, on_done, among,
            context, [drafts[i] for i in range(len(audio))] if drafts else None,
        )  # fmt: skip
        return [self._aligned(one, slots[i]) for i, one in enumerate(decoded)] if align else decoded

    def _aligned(self, decoded: Decoded, slots: Tensor) -> Decoded:
        return replace(decoded, spans=self.align_tokens(slots, decoded.tokens))

    def align_tokens(self, slots: Tensor, tokens: Sequence[int]) -> list[TokenSpan] | None:
        """Where CTC places tokens in the audio tokens (S, H) of a clip; None if it cannot, see `ctc.lm_head_align`."""
        return lm_head_align(slots, self.backbone.lm_head_weight, self.backbone.softcap, tokens, self.blank)

    @torch.no_grad()
    def transcribe_slots(
        self,
        slots: Tensor,
        slot_lengths: Tensor,
        language: str | Sequence[str] = "en",
        options: DenoiseOptions | int | None = None,
        seed: int = 0,
        canvas_length: int | None = None,
        on_step: OnStep | None = None,
        start: Start | None = None,
        engine: EngineName = "fast",
        rows: int = 32,
        on_done: Callable[[int], None] | None = None,
        among: Sequence[str] | None = None,
        context: str = "",
        drafts: Sequence[list[DraftToken]] | None = None,
    ) -> list[Decoded]:
        """`transcribe_batch` for audio tokens (B, S, H), slot_lengths (B,); `language` may be one a row.

        Args:
            drafts: a speller's, one a row, for canvases that start from drafts; None: what CTC hears in the slots.
        """
        if not isinstance(options, DenoiseOptions):
            options = self.backbone.denoise_options(options or DenoiseOptions.steps)
        languages = [language] * len(slots) if isinstance(language, str) else list(language)
        among = tuple(among or self.languages)
        languages = [self._asked(code, among) for code in languages]
        if context and not self.reads_context:
            raise AsrError("the model was not trained to read context in its prompt; leave out initial_prompt and hotwords")
        start = start or self.start
        told = languages, options, seed, canvas_length, start, among, context, drafts
        return Decoding(self, slots, slot_lengths, *told).run(engine, rows, on_step, on_done)

    def _asked(self, language: str, among: Sequence[str]) -> str:
        """What a prompt has to name; where only one language is possible there is nothing to find."""
        if language != AUTO:
            return language
        if odd := [code for code in among if code not in LANGUAGES]:
            raise AsrError(f"language {odd[0]!r} is not one of {', '.join(LANGUAGES)}")
        if len(among) == 1:
            return among[0]
        if not self.finds_language:
            known = ", ".join(self.languages)
            raise AsrError(f"the model was not trained to find the language; name it, one of {known}, in place of {AUTO!r}")
        return AUTO

    def text(self, tokens: Sequence[int]) -> str:
        """What token ids spell, special tokens left out."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def _ids(draft: Sequence[DraftToken]) -> list[int]:
    return [token.id for token in draft]
