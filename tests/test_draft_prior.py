"""draft_prior.py: CTC's log-probabilities at the positions of a drafted canvas, in both engines."""

from pathlib import Path

import pytest
import torch
from tiny_model import tiny_model

from diffusion_gemma_asr.beam import DraftLM, draft_with_lm
from diffusion_gemma_asr.ctc import DraftToken, lm_head_draft
from diffusion_gemma_asr.decoding import EngineName
from diffusion_gemma_asr.draft_prior import FLOOR, NO_SLOT, SURE, TOP, Heard, Prior, draft_prior, hear
from diffusion_gemma_asr.edits import SPARE, edit_layout
from diffusion_gemma_asr.lm_head import logprobs_of, predict
from diffusion_gemma_asr.losses import soft_capped_logits
from diffusion_gemma_asr.model import DiffusionGemmaASR
from diffusion_gemma_asr.ngram import NgramLM

BLANK, CAP = 0, 30.0


@pytest.fixture
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder, lora=False)


def heard_of(probabilities: list[list[float]]) -> Heard:
    """Of one row, all tokens in the order of their probability."""
    logprobs, ids = torch.tensor(probabilities).log()[None].sort(-1, descending=True)
    return Heard(ids, logprobs, torch.tensor(probabilities)[None, :, BLANK].log())


def test_hearing_gives_the_greedy_draft_and_the_likeliest_tokens() -> None:
    torch.manual_seed(0)
    slots, weight, lengths = torch.randn(2, 9, 8), torch.randn(40, 8), torch.tensor([9, 5])
    heard = hear(slots, weight, CAP, BLANK)
    assert heard.draft(lengths, BLANK) == lm_head_draft(slots, weight, CAP, lengths, BLANK)
    logprobs = soft_capped_logits(slots, weight, CAP).log_softmax(-1)
    assert heard.ids.shape == (2, 9, TOP)
    torch.testing.assert_close(logprobs.gather(-1, heard.ids), heard.logprobs)
    torch.testing.assert_close(heard.blank, logprobs[..., BLANK])


def test_every_position_takes_the_slot_that_it_stands_for() -> None:
    """Slots: a blank; 1 twice, surer the second time; 2 without a blank between; two blanks, the second one less sure."""
    heard = heard_of([
        [0.9, 0.05, 0.05],
        [0.2, 0.5, 0.3],
        [0.1, 0.8, 0.1],
        [0.3, 0.1, 0.6],
        [0.8, 0.15, 0.05],
        [0.5, 0.2, 0.3],
    ])  # fmt: skip
    (draft,) = heard.draft(torch.tensor([6]), BLANK)
    assert [token.id for token in draft] == [1, 2]
    size = 2 + len(edit_layout([1, 2], BLANK)) + 1
    own = Heard(*(part[0] for part in heard))
    prior = draft_prior(own, draft, 2, size, BLANK, 1.0)
    gains = torch.zeros(size, 3).scatter_add(-1, *prior)
    for place, slot in {2: 0, 3: 2, 5: 3, 6: 5}.items():  # gap, token 1, token 2, gap behind it
        expected = heard.logprobs[0, slot].gather(-1, heard.ids[0, slot].argsort()) - FLOOR
        torch.testing.assert_close(gains[place], expected)
    for place in (4, *range(7, 7 + SPARE)):  # no slot lies between 1 and 2, nor behind the last gap
        assert gains[place].tolist() == [NO_SLOT, 0, 0]
    assert not gains[[0, 1, size - 1]].any()  # the lead and the end
    assert (draft_prior(own, draft, 2, size, BLANK, 0.5).gains == prior.gains / 2).all()
    assert draft_prior(own, draft, 2, 4, BLANK, 1.0).ids.shape == (4, 3)


def test_a_language_model_counts_at_the_tokens_positions() -> None:
    """Token 2 is likelier behind 1 than 1 behind 1; the blank and the gaps are as CTC heard them."""
    lm = DraftLM(NgramLM.count([[1, 2], [1, 2], [2]], 3, 1, 2, order=2, least=1), 1, 2, 0.5, 1.5)
    heard = heard_of([[0.1, 0.8, 0.1], [0.8, 0.1, 0.1], [0.4, 0.25, 0.35]])
    draft = [DraftToken(1, 0, 1, 0.8), DraftToken(2, 2, 3, 0.35)]
    own = Heard(*(part[0] for part in heard))
    size = len(edit_layout([1, 2], BLANK))
    without, having = (
        torch.zeros(size, 3).scatter_add(-1, *draft_prior(own, draft, 0, size, BLANK, 2.0, model))
        for model in (None, lm)
    )
    expected = torch.zeros(size, 3)
    for place, before, after in ((1, [], [2]), (3, [1], [])):
        expected[place, 1:] = 2.0 * torch.from_numpy(lm.gains(before, after, [1, 2])).float()
    torch.testing.assert_close(having - without, expected)
    assert without[3].argmax() == BLANK and having[3].argmax() == 2


def test_a_spellers_draft_counts_more_than_what_the_slots_say() -> None:
    """Its second token is none that the slots know of, its third does not fit; a blank is expected in every gap."""
    heard = Heard(*(part[0, :, :2] if part.dim() == 3 else part[0] for part in heard_of([[0.1, 0.8, 0.05, 0.05]] * 4)))
    draft = [DraftToken(1, 0, 2, 0.8), DraftToken(3, 1, 3, 0.4), DraftToken(1, 3, 4, 0.9)]
    prior = draft_prior(heard, draft, 1, 6, BLANK, 0.5, None, spelled=True)
    gains = torch.zeros(6, 4).scatter_add(-1, *prior)
    assert not gains[0].any()
    for place in (1, 3, 5):
        assert gains[place].tolist() == [0.5 * NO_SLOT, 0, 0, 0]
    sure = 0.5 * (SURE - FLOOR)
    blank = 0.5 * (float(torch.tensor(0.1).log()) - FLOOR)
    assert gains[2].tolist() == pytest.approx([blank, sure, 0, 0])
    assert gains[4].tolist() == pytest.approx([0, 0.5 * (float(torch.tensor(0.8).log()) - FLOOR), 0, sure])


def test_drafts_are_searched_with_the_models_language_model(model: DiffusionGemmaASR) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([6, 4])
    slots = 2 * torch.randn(2, 6, model.backbone.hidden_size)
    greedy = model.transcribe_slots(slots, lengths, "en", 1, start="draft")
    tokens = sorted({token.id for row in greedy for token in row.draft_tokens})
    special = model.prompts.special
    said = [[tokens[0]] * 3] * 9
    ends = special["bos"], special["eos"]
    model.lm = DraftLM(NgramLM.count(said, model.backbone.vocab_size, *ends, 2), *ends, 3.0, 0.0)
    searched = model.transcribe_slots(slots, lengths, "en", 1, start="draft")
    heard = Heard(*(part[0] for part in model.hear(slots)))
    expected = draft_with_lm(heard.ids.numpy(), heard.logprobs.numpy(), heard.blank.numpy(), model.blank, model.lm)
    assert list(searched[0].draft_tokens) == expected
    assert searched[0].draft_tokens != greedy[0].draft_tokens
    assert model.transcribe_slots(slots, lengths, "en", 1, start="noise")[0].draft_tokens == greedy[0].draft_tokens


def test_an_empty_draft_has_gaps_alone() -> None:
    heard = Heard(*(part[0] for part in heard_of([[0.9, 0.1], [0.6, 0.4]])))
    prior = draft_prior(heard, [], 0, 6, BLANK, 1.0)
    assert prior.ids[0].tolist() == [0, 1] and prior.gains[0, 1] == pytest.approx(-FLOOR + torch.tensor(0.4).log())


def test_predictions_are_those_of_raised_logits() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(10, 8), torch.randn(20, 8)
    prior = Prior(torch.stack([torch.randperm(20)[:3] for _ in range(10)]), 5 * torch.rand(10, 3))
    logits = prior.raised(soft_capped_logits(hidden, weight, CAP))
    found = predict(hidden, weight, CAP, torch.full((10,), 0.7), torch.rand(10), prior)
    assert (found.best == logits.argmax(-1)).all()
    torch.testing.assert_close(found.soft, (logits / 0.7).softmax(-1) @ weight)
    expected = logits.log_softmax(-1).gather(-1, found.best[:, None])[:, 0]
    torch.testing.assert_close(logprobs_of(hidden, weight, CAP, found.best, prior), expected)


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_an_overwhelming_prior_keeps_the_draft(model: DiffusionGemmaASR, engine: EngineName) -> None:
    torch.manual_seed(2)
    lengths = torch.tensor([12, 30, 7])
    slots = torch.randn(3, 30, model.backbone.hidden_size) * model.backbone.embedding_scale()

    def kept(draft_weight: float) -> list[bool]:
        model.draft_weight = draft_weight
        found = model.transcribe_slots(slots, lengths, start="draft", engine=engine)
        return [row.tokens[: len(row.draft_tokens)] == [token.id for token in row.draft_tokens] for row in found]

    assert all(kept(1e4)) and not any(kept(0.0))
