"""The backbone: what the canvas sees, that padding changes nothing, and LoRA that keeps to its own stack."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from tiny_model import RANK, lively_lora, tiny_backbone
from torch import Tensor
from transformers import DynamicCache

from diffusion_gemma_asr.checkpoint.parts import load_backbone
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.denoise.steps import DenoiseOptions
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.model.backbone import Backbone
from diffusion_gemma_asr.model.config import BackboneConfig
from diffusion_gemma_asr.model.prefill import Prefill

ENCODER, DECODER = "encoder.language_model", "model.decoder"  # how the stacks' parameters are called
CANVAS = 7
WIDTH = tiny.HIDDEN_SIZE


@pytest.fixture(scope="module")
def backbone(backbone_folder: Path) -> Backbone:
    return tiny_backbone(backbone_folder)


@pytest.fixture
def adapted(backbone_folder: Path) -> Backbone:
    """A backbone with lively LoRA, to be changed by its test."""
    found = tiny_backbone(backbone_folder)
    found.add_lora(RANK, 2 * RANK)
    lively_lora(found)
    return found


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(tiny.VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def full(ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool)


@torch.no_grad()
def read(backbone: Backbone, ids: Tensor, lengths: Tensor | None = None) -> tuple[Prefill, Tensor]:
    return backbone.prefill(backbone.embed(ids), full(ids), lengths)


@torch.no_grad()
def predict(backbone: Backbone, prefill: Prefill, signal: Tensor | None = None) -> Tensor:
    return backbone.denoise_logits(draw(len(prefill.lengths), CANVAS, seed=9), prefill, signal)


def keys_of(prefill: Prefill) -> list[Tensor]:
    return [keys for keys, _ in prefill.layers()]


# -- what is seen --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_padded_rows_give_what_they_give_alone(backbone: Backbone) -> None:
    lengths = torch.tensor([3, 12, 7, 1])
    ids = draw(4, 12)
    mask = torch.arange(12) < lengths[:, None]
    embeds = backbone.embed(ids)
    embeds[~mask] = 100 * torch.randn(embeds[~mask].shape)  # whatever stands in the padding
    prefill, hidden = backbone.prefill(embeds, mask)
    canvas, signal = draw(4, CANVAS, seed=9), torch.randn(4, CANVAS, tiny.VOCAB_SIZE)
    logits = backbone.denoise_logits(canvas, prefill, signal)
    assert prefill.lengths.tolist() == lengths.tolist()
    for i, n in enumerate(lengths.tolist()):
        alone, own = read(backbone, ids[i : i + 1, :n])
        expected = backbone.denoise_logits(canvas[i : i + 1], alone, signal[i : i + 1])
        torch.testing.assert_close(hidden[i, :n], own[0], atol=1e-5, rtol=1e-5)
        # Logits reach 30: float32 leaves 1e-5 or so of them, and more when threads sum in another order.
        torch.testing.assert_close(logits[i], expected[0], atol=5e-5, rtol=1e-5)


@torch.no_grad()
def test_padded_rows_give_what_transformers_own_masks_give(backbone: Backbone) -> None:
    ids, lengths = draw(2, 9), torch.tensor([9, 5])
    mask = torch.arange(9) < lengths[:, None]
    prefill, hidden = backbone.prefill(backbone.embed(ids), mask)
    inner = backbone.model.model
    cache = DynamicCache(config=backbone.config)
    theirs = inner.encoder(input_ids=ids, attention_mask=mask.long(), past_key_values=cache)
    canvas = draw(2, CANVAS, seed=9)
    decoded = inner.decoder(
        decoder_input_ids=canvas,
        past_key_values=theirs.past_key_values,
        decoder_attention_mask=torch.cat([mask, full(canvas)], 1).long(),
        decoder_position_ids=lengths[:, None] + torch.arange(CANVAS),
    ).last_hidden_state
    torch.testing.assert_close(hidden[mask], theirs.last_hidden_state[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone.denoise_hidden(canvas, prefill), decoded, atol=1e-5, rtol=1e-5)


def test_canvas_never_sees_a_transcript_behind_the_prompt(backbone: Backbone) -> None:
    lengths = torch.tensor([10, 6])
    ids = draw(2, 15)
    joined, _ = read(backbone, ids, lengths)
    for row, n in enumerate(lengths.tolist()):
        prompt, _ = read(backbone, ids[row : row + 1, :n])
        canvas = draw(2, CANVAS, seed=9)[row : row + 1]
        with torch.no_grad():
            expected = backbone.denoise_logits(canvas, prompt)  # its positions continue at n
        torch.testing.assert_close(predict(backbone, joined)[row], expected[0], atol=1e-5, rtol=1e-5)
    seen, _ = read(backbone, ids)
    change = (predict(backbone, seen) - predict(backbone, joined)).abs().max()
    assert change > 0.1, "the transcript would make no difference if it were seen"


@torch.no_grad()
def test_canvas_positions_continue_at_the_prompts_length(backbone: Backbone) -> None:
    """The cache alone does not say where the canvas stands: `lengths` does."""
    prefill, _ = read(backbone, draw(1, 10))
    moved = Prefill(prefill.cache, prefill.visible, prefill.lengths + 5)
    canvas = draw(1, CANVAS, seed=9)
    ours = backbone.denoise_hidden(canvas, moved)
    theirs = backbone.model.model.decoder(
        decoder_input_ids=canvas,
        past_key_values=prefill.cache,
        decoder_position_ids=15 + torch.arange(CANVAS)[None],
    ).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (ours - backbone.denoise_hidden(canvas, prefill)).abs().max() > 1e-3


@torch.no_grad()
def test_prompt_is_read_causally_and_canvas_both_ways(backbone: Backbone) -> None:
    ids, other = draw(1, 10), draw(1, 10)
    other[0, 6] = (other[0, 6] + 1) % tiny.VOCAB_SIZE
    prefill, hidden = read(backbone, ids)
    change = (hidden - read(backbone, other)[1]).abs().amax(-1)[0]
    assert change[:6].max() < 1e-5
    assert change[6:].min() > 1e-3
    canvas = draw(1, CANVAS, seed=9)
    first = backbone.denoise_hidden(canvas, prefill)
    canvas[0, 3] = (canvas[0, 3] + 1) % tiny.VOCAB_SIZE
    assert (first - backbone.denoise_hidden(canvas, prefill)).abs().amax(-1).min() > 1e-3


def test_denoising_leaves_the_prefill_as_it_was(backbone: Backbone) -> None:
    prefill, _ = read(backbone, draw(2, 8), torch.tensor([8, 5]))
    before = [keys.clone() for keys in keys_of(prefill)]
    first = predict(backbone, prefill)
    torch.testing.assert_close(predict(backbone, prefill), first, atol=0, rtol=0)
    torch.testing.assert_close(keys_of(prefill), before, atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [None, [8, 5]])
def test_self_conditioning_is_what_the_library_makes_of_logits(backbone: Backbone, lengths: list[int] | None) -> None:
    prefill, _ = read(backbone, draw(2, 8), None if lengths is None else torch.tensor(lengths))
    canvas, signal = draw(2, CANVAS, seed=9), 5 * torch.randn(2, CANVAS, tiny.VOCAB_SIZE)
    seen = torch.cat([prefill.visible, torch.ones(2, CANVAS, dtype=torch.bool)], 1)
    mask = seen[:, None, None].expand(-1, 1, CANVAS, -1)
    theirs = backbone.model.model.decoder(
        decoder_input_ids=canvas,
        past_key_values=prefill.cache,
        self_conditioning_logits=signal,
        decoder_attention_mask={"full_attention": mask, "sliding_attention": mask},
        decoder_position_ids=prefill.lengths[:, None] + torch.arange(CANVAS),
    ).last_hidden_state
    ours = backbone.denoise_hidden(canvas, prefill, signal)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (ours - backbone.denoise_hidden(canvas, prefill)).abs().amax((1, 2)).min() > 1e-2


def test_prompts_fill_the_window_but_no_more(backbone: Backbone) -> None:
    config = copy.deepcopy(backbone.model.config)
    config.text_config.sliding_window = 12
    small = Backbone.from_config(config).eval()
    longest, _ = read(small, draw(1, 11))
    assert {keys.shape[2] for keys in keys_of(longest)} == {11}, "a layer forgot the beginning"
    with pytest.raises(ValueError, match=r"12 tokens.*window is 12"):
        read(small, draw(1, 12))


# -- embeddings and logits -----------------------------------------------------------------------------------


@torch.no_grad()
def test_embedding_scale_is_the_size_of_embedded_tokens(backbone: Backbone) -> None:
    rows = backbone.embed(torch.arange(backbone.vocab_size)[None])
    assert rows.shape == (1, tiny.VOCAB_SIZE, tiny.HIDDEN_SIZE)
    assert backbone.embedding_scale() == pytest.approx(float(rows.pow(2).mean().sqrt()), rel=1e-4)


@torch.no_grad()
def test_logits_are_soft_capped(backbone: Backbone) -> None:
    hidden = torch.linspace(-200, 200, 5)[:, None] * torch.randn(5, tiny.HIDDEN_SIZE)
    plain = hidden @ backbone.lm_head_weight.T
    logits = backbone.logits(hidden)
    assert backbone.softcap == 30.0
    assert plain.abs().max() > 300 > 30 >= logits.abs().max()
    torch.testing.assert_close(logits, 30 * torch.tanh(plain / 30), atol=1e-4, rtol=1e-4)


def test_denoise_logits_are_those_transformers_gives(backbone: Backbone) -> None:
    ids, canvas = draw(2, 8), draw(2, CANVAS, seed=9)
    with torch.no_grad():
        theirs = backbone.model(input_ids=ids, decoder_input_ids=canvas).logits
    torch.testing.assert_close(predict(backbone, read(backbone, ids)[0]), theirs, atol=1e-4, rtol=1e-5)


def test_loads_frozen(backbone: Backbone) -> None:
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not backbone.training
    assert (backbone.hidden_size, backbone.vocab_size) == (tiny.HIDDEN_SIZE, tiny.VOCAB_SIZE)
    assert backbone.lora_state_dict() == {}


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_backbone(BackboneConfig(str(tmp_path / "nowhere")), local_files_only=True)


# -- LoRA ----------------------------------------------------------------------------------------------------


def test_new_lora_changes_nothing(backbone_folder: Path, backbone: Backbone) -> None:
    expected = predict(backbone, read(backbone, draw(2, 8))[0])
    new = tiny_backbone(backbone_folder)
    new.add_lora(RANK, 2 * RANK)
    torch.testing.assert_close(predict(new, read(new, draw(2, 8))[0]), expected, atol=0, rtol=0)


def test_only_lora_is_trained_on_both_stacks(adapted: Backbone) -> None:
    trained = {name for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in adapted.model.named_parameters() if "lora_" in name}
    projections = {name.split(".lora_")[0] for name in trained}
    # Of the six layers four are sliding, with q, k, v, o; in the two full ones the keys are the values: no v.
    per_stack = 4 * 4 + 2 * 3
    assert sum(ENCODER in name for name in projections) == per_stack
    assert sum(DECODER in name for name in projections) == per_stack
    assert len(projections) == 2 * per_stack
    assert not [name for name in projections if "vision" in name]
    shapes = {name: tuple(p.shape) for name, p in adapted.lora_state_dict().items()}
    assert all(shape[0] == RANK for name, shape in shapes.items() if "lora_A" in name)
    assert all(shape[1] == RANK for name, shape in shapes.items() if "lora_B" in name)


def test_the_stacks_share_their_weights_but_not_their_lora(adapted: Backbone) -> None:
    parameters = dict(adapted.model.named_parameters(remove_duplicate=False))
    ours = [name for name in parameters if f"{ENCODER}.layers" in name and "self_attn" in name]
    assert {"lora_" in name for name in ours} == {True, False}
    for name in ours:
        shared = parameters[name].data_ptr() == parameters[name.replace(ENCODER, "decoder")].data_ptr()
        assert shared == ("lora_" not in name), name


def test_encoder_lora_leaves_the_decoder_alone(adapted: Backbone) -> None:
    prefill, hidden = read(adapted, draw(2, 8))
    before = predict(adapted, prefill)
    lively_lora(adapted, seed=1, stack=ENCODER)
    torch.testing.assert_close(predict(adapted, prefill), before, atol=0, rtol=0)
    assert (read(adapted, draw(2, 8))[1] - hidden).abs().max() > 0.1


def test_decoder_lora_leaves_the_encoder_alone(adapted: Backbone) -> None:
    prefill, hidden = read(adapted, draw(2, 8))
    before = predict(adapted, prefill)
    lively_lora(adapted, seed=1, stack=DECODER)
    again, same = read(adapted, draw(2, 8))
    torch.testing.assert_close(same, hidden, atol=0, rtol=0)
    torch.testing.assert_close(keys_of(again), keys_of(prefill), atol=0, rtol=0)
    assert (predict(adapted, again) - before).abs().max() > 0.1


@pytest.mark.parametrize("fresh", [True, False])
def test_merged_lora_gives_the_same_logits(backbone_folder: Path, fresh: bool) -> None:
    model = tiny_backbone(backbone_folder)
    model.add_lora(RANK, 2 * RANK)
    if not fresh:
        lively_lora(model)
    prefill, hidden = read(model, draw(2, 8))
    logits = predict(model, prefill)
    model.merge_lora()
    merged, merged_hidden = read(model, draw(2, 8))
    # Float32 rounds otherwise in a merged product: hidden states are of size 1, logits of size 10.
    torch.testing.assert_close(merged_hidden, hidden, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(predict(model, merged), logits, atol=1e-4, rtol=1e-5)
    assert model.lora_state_dict() == {}
    assert not [name for name, _ in model.model.named_modules() if "lora" in name or "base_layer" in name]


def test_lora_state_dict_round_trip(adapted: Backbone, backbone_folder: Path) -> None:
    state = {name: value.clone() for name, value in adapted.lora_state_dict().items()}
    other = tiny_backbone(backbone_folder)
    other.add_lora(RANK, 2 * RANK)
    other.load_lora_state_dict(state)
    expected = predict(adapted, read(adapted, draw(2, 8))[0])
    torch.testing.assert_close(predict(other, read(other, draw(2, 8))[0]), expected, atol=0, rtol=0)
    torch.testing.assert_close(other.lora_state_dict(), state, atol=0, rtol=0)


def _narrower(state: dict[str, Tensor]) -> None:
    name = next(name for name in state if "lora_A" in name)
    state[name] = state[name][:, :-1]


def _shorter(state: dict[str, Tensor]) -> None:
    state.popitem()


def _longer(state: dict[str, Tensor]) -> None:
    state["model.decoder.layers.99.self_attn.q_proj.lora_A.weight"] = torch.zeros(RANK, tiny.HIDDEN_SIZE)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_narrower, rf"lora_A\.weight is \({RANK}, {WIDTH - 1}\).*needs \({RANK}, {WIDTH}\)"),
        (_shorter, "1 names differ"),
        (_longer, r"1 names differ, first model\.decoder\.layers\.99"),
    ],
)
def test_lora_of_another_backbone_is_refused(
    adapted: Backbone, spoil: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    state = dict(adapted.lora_state_dict())
    spoil(state)
    with pytest.raises(CheckpointError, match=message):
        adapted.load_lora_state_dict(state)


def test_lora_of_another_rank_is_refused(adapted: Backbone, backbone_folder: Path) -> None:
    other = tiny_backbone(backbone_folder)
    with pytest.raises(CheckpointError, match="names differ"):
        other.load_lora_state_dict(adapted.lora_state_dict())  # add_lora was forgotten
    other.add_lora(2 * RANK)
    with pytest.raises(CheckpointError, match=rf"\({RANK}, .*needs \({2 * RANK}, "):
        other.load_lora_state_dict(adapted.lora_state_dict())


# -- how to denoise ------------------------------------------------------------------------------------------


def test_the_generation_config_says_how_to_denoise(backbone_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backbone"
    shutil.copytree(backbone_folder, folder)
    path = folder / "generation_config.json"
    said = json.loads(path.read_text())
    said |= {"t_max": 0.5, "t_min": 0.25, "stability_threshold": 2, "confidence_threshold": 0.01}
    said["sampler_config"]["entropy_bound"] = 3.0
    path.write_text(json.dumps(said))
    backbone = tiny_backbone(folder)
    settings = backbone.sampler_settings()
    assert DecodeOptions(steps=5).denoising(settings) == DenoiseOptions(5, 3.0, 0.5, 0.25, 2, 0.01)
    assert DecodeOptions(steps=5, t_max=0.9).denoising(settings).t_max == 0.9, "what is asked for goes before"
    silent = Backbone.from_config(backbone.model.config).sampler_settings()
    assert DecodeOptions(steps=4).denoising(silent) == DenoiseOptions(steps=4)
