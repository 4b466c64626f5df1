"""The denoising backbone: with prefill.py the only module that knows how transformers' DiffusionGemma looks inside.

DiffusionGemma is an encoder and a decoder with tied weights. The encoder reads the prompt causally and leaves a
key/value cache; the decoder sees a canvas in both directions and reads that cache without changing it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache

from ..errors import CheckpointError
from .experts import implementation
from .head import Head
from .prefill import CACHE, FilledCache, Prefill, read_layer, write_layer

LORA_TARGETS = r"model\.(encoder\.language_model|decoder)\.layers\.\d+\.self_attn\.[qkvo]_proj"


class Backbone(nn.Module):
    """DiffusionGemma as the rest of the system sees it: embed, prefill, denoise, logits, LoRA.

    Every batch is padded on the right: a causal encoder then never reads padding, and no position shifts.
    """

    def __init__(self, model: DiffusionGemmaForBlockDiffusion):
        super().__init__()
        self.model = model
        self.config = model.config.text_config
        model.set_experts_implementation(implementation(self.config.num_experts, self.config.top_k_experts))
        self.read_layer, self.write_layer = read_layer, write_layer  # training may compile them (train/compiled.py)
        self.recorded: dict[Any, Any] = {}  # steps that an engine recorded, for the next one (denoise/static_engine.py)

    @classmethod
    def from_config(cls, config: DiffusionGemmaConfig) -> Backbone:
        """A backbone with random weights."""
        return cls(DiffusionGemmaForBlockDiffusion(config))

    # -- shape and scale ------------------------------------------------------------------------------------------

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and of lm_head."""
        return self.config.vocab_size

    @property
    def softcap(self) -> float:
        """Logits are `softcap * tanh(x / softcap)`."""
        return self.config.final_logit_softcapping

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, H), tied with the embeddings."""
        return self.model.lm_head.weight

    @property
    def head(self) -> Head:
        """The output head."""
        return Head(self.lm_head_weight, self.softcap)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head_weight.device

    @torch.no_grad()
    def embedding_scale(self) -> float:
        """Root mean square of one component of the token rows as the layers see them, after the factor sqrt(hidden)."""
        mean_square = sum(float(rows.float().pow(2).sum()) for rows in self.lm_head_weight.split(8192))
        return (mean_square / self.lm_head_weight.numel() * self.hidden_size) ** 0.5

    def sampler_settings(self) -> dict[str, float]:
        """How this checkpoint's generation_config.json says to denoise: entropy_bound, t_max, t_min, stability_threshold and
        confidence_threshold, as far as it says something of them."""
        said = self.model.generation_config
        given = {
            "entropy_bound": said.sampler_config.entropy_bound if said.sampler_config else None,
            "t_max": said.t_max,
            "t_min": said.t_min,
            "stability_threshold": said.stability_threshold,
            "confidence_threshold": said.confidence_threshold,
        }
        return {name: value for name, value in given.items() if value is not None}

    # -- LoRA ---------------------------------------------------------------------------------------------------------

    def add_lora(self, rank: int = 16, alpha: int = 32, dropout: float = 0.0, shared: bool = False) -> None:
        """Freezes the model and puts LoRA on q, k, v, o of every layer of both stacks.

        Args:
            rank, alpha, dropout, shared: see `model.config.LoraConfig`. The stacks share their weights; unless `shared`
                they do not share their LoRA, so each learns its own part.
        """
        self.model.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS, bias="none")
        inject_adapter_in_model(config, self.model)
        if shared:
            encoder, decoder = self.model.model.encoder.language_model.layers, self.model.model.decoder.layers
            for name, layer in decoder.named_modules():
                if isinstance(layer, LoraLayer):
                    twin = encoder.get_submodule(name)
                    layer.lora_A, layer.lora_B = twin.lora_A, twin.lora_B  # parameters are then named once, the encoder's

    def lora_state_dict(self) -> dict[str, Tensor]:
        """The LoRA matrices by name; empty without LoRA."""
        return {name.replace(".default", ""): p.detach() for name, p in self.model.named_parameters() if "lora_" in name}

    def load_lora_state_dict(self, state: dict[str, Tensor]) -> None:
        """Fills the LoRA matrices; `add_lora` comes first.

        Raises:
            CheckpointError: a matrix is missing, left over, or of another shape.
        """
        own = {name.replace(".default", ""): p for name, p in self.model.named_parameters() if "lora_" in name}
        if odd := sorted(own.keys() ^ state.keys()):
            raise CheckpointError(f"the LoRA matrices do not fit this backbone: {len(odd)} names differ, first {odd[0]}")
        for name, parameter in own.items():
            if parameter.shape != state[name].shape:
                raise CheckpointError(
                    f"{name} is {tuple(state[name].shape)} in the adapter, but this backbone needs "
                    f"{tuple(parameter.shape)}; use the backbone that the adapter was trained on"
                )
        for name, parameter in own.items():
            parameter.data.copy_(state[name])

    def merge_lora(self) -> None:
        """Adds LoRA into the attention weights, for inference; the two stacks' attention is tied afterwards only where
        they share their LoRA."""
        parents = dict(self.model.named_modules())
        merged: dict[tuple[int, ...], tuple[nn.Parameter, ...]] = {}  # each sum, and what it is made of
        for name, layer in list(parents.items()):
            if isinstance(layer, LoraLayer):
                base = layer.get_base_layer()
                made_of = (base.weight, *layer.lora_A.parameters(), *layer.lora_B.parameters())
                key = tuple(map(id, made_of))
                if key not in merged:
                    base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
                    layer.merge()
                    merged[key] = (base.weight, *made_of)  # kept, so that no other parameter gets their ids
                base.weight = merged[key][0]
                parent, _, child = name.rpartition(".")
                setattr(parents[parent], child, base)

    # -- experts ------------------------------------------------------------------------------------------------------

    @property
    def experts(self) -> list[nn.Module]:
        """The experts of each layer."""
        return [layer.experts for layer in self.model.model.decoder.layers]

    def share_experts(self) -> list[nn.Module]:
        """Gives both stacks the same modules as experts, and returns these, one a layer.

        As loaded, a layer's two modules hold one parameter: what then replaces the parameter in one of them alone would
        untie the stacks without a word.
        """
        shared = self.experts
        for layer, experts in zip(self.model.model.encoder.language_model.layers, shared, strict=True):
            layer.experts = experts
        return shared

    def recompute_experts(self) -> None:
        """Lets the backward pass compute the experts anew from their inputs, where it would hold all that they made.

        Packed weights are then unpacked a layer at a time there as well.
        """
        for experts in self.share_experts():
            experts.forward = partial(checkpoint, experts.forward, use_reentrant=False, preserve_rng_state=False)

    # -- forward ------------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """(B, P) ids → (B, P, H) rows, scaled as the layers expect them."""
        return self.model.model.decoder.embed_tokens(ids)

    def prefill(self, embeds: Tensor, mask: Tensor, lengths: Tensor | None = None) -> tuple[Prefill, Tensor]:
        """Reads prompts causally.

        Args:
            embeds: (B, P, H) from `embed`, audio slots overwritten.
            mask: (B, P) bool, real tokens, padding on the right.
            lengths: (B,) prompt tokens, where the row goes on with a transcript that the canvas must not see (training);
                by default the whole row is prompt.

        Returns:
            the Prefill, and the encoder's last hidden states (B, P, H).

        Raises:
            ValueError: the prompt is longer than the sliding window, where the cache would forget its beginning.
        """
        size = embeds.shape[1]
        if size >= self.config.sliding_window:
            raise ValueError(f"a prompt of {size} tokens; the backbone's window is {self.config.sliding_window}")
        if lengths is None:
            lengths = mask.sum(1)
        encoder = self.model.model.encoder.language_model
        positions = torch.arange(size, device=embeds.device)[None]
        rotary = {kind: encoder.rotary_emb(embeds, positions, kind) for kind in encoder.unique_layer_types}
        hidden, filled = embeds, []
        for layer, kind in zip(encoder.layers, self.config.layer_types, strict=True):
            hidden, keys, values = self.read_layer(layer, hidden, rotary[kind], positions)
            filled.append((keys, values))
        visible = torch.arange(size, device=embeds.device) < lengths[:, None]
        return Prefill(FilledCache(filled), visible, lengths), encoder.norm(hidden)

    def extend(self, embeds: Tensor, prefill: Prefill, seen: Tensor | None = None) -> tuple[Prefill, Tensor]:
        """Reads more tokens of each row causally, behind what it has read.

        Args:
            embeds: (B, N, H) from `embed`.
            prefill: of the same B rows; a cache that `prefill` or this method made grows, and must not be used otherwise
                afterwards.
            seen: (N, N) bool, which of these tokens each one sees, itself among them; its position is their number. None:
                all before it. Several continuations that begin alike are so read as one tree.

        Returns:
            the longer Prefill, and the last hidden states (B, N, H).
        """
        batch, more, _ = embeds.shape
        visible = torch.cat([prefill.visible, prefill.visible.new_ones(batch, more)], 1)  # (B, P + N)
        if seen is None:
            seen = torch.ones(more, more, dtype=torch.bool, device=embeds.device).tril()
        behind = torch.cat([prefill.visible[:, None].expand(-1, more, -1), seen.expand(batch, -1, -1)], 2)
        mask = behind[:, None]  # (B, 1, N, P + N)
        cache = prefill.cache
        if isinstance(cache, FilledCache):
            cache = DynamicCache(config=self.config)
            for index, (keys, values) in enumerate(prefill.layers()):
                cache.update(keys, values, index)
        out = self.model.model.encoder(
            inputs_embeds=embeds,
            attention_mask={"full_attention": mask, "sliding_attention": mask},
            position_ids=prefill.lengths[:, None] + seen.sum(1) - 1,
            **{CACHE: cache},
        )
        return Prefill(cache, visible, prefill.lengths + more), out.last_hidden_state

    def denoise_hidden(
        self,
        canvas: Tensor,
        prefill: Prefill,
        self_conditioning: Tensor | None = None,
        soft: Tensor | None = None,
        slots: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Tensor:
        """One pass of the decoder over the canvas.

        Args:
            canvas: (B, C) ids.
            prefill: of the same B rows.
            self_conditioning: (B, C, V) logits of the pass before, None at the first.
            soft: (B, C, H) mean rows of lm_head, used where there are no such logits; None: zeros.
            slots, share: see `denoise_seen`.

        Returns:
            (B, C, H) last hidden states, before lm_head.
        """
        head = self.lm_head_weight
        if soft is None:
            soft = head.new_zeros(*canvas.shape, self.hidden_size)
        if self_conditioning is not None:
            soft = self_conditioning.softmax(-1, dtype=torch.float32).to(head.dtype) @ head
        seen = None
        if not bool(prefill.visible.all()):
            seen = torch.cat([prefill.visible, prefill.visible.new_ones(canvas.shape)], 1)  # (B, P + C)
        return self.denoise_seen(canvas, seen, prefill, soft, slots, share)

    def denoise_hidden_from_soft(
        self,
        canvas: Tensor,
        canvas_lengths: Tensor,
        prefill: Prefill,
        soft: Tensor,
        slots: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Tensor:
        """One pass of the decoder over canvases of several lengths, conditioned on mean embeddings instead of logits.

        Args:
            canvas: (B, C) ids; canvas_lengths (B,): positions in use, the others are not seen.
            prefill: of the same B rows.
            soft: (B, C, H) mean row of lm_head under each position's last prediction; zeros at a row's first pass.
            slots, share: see `denoise_seen`.

        Returns:
            (B, C, H) last hidden states, before lm_head.
        """
        places = torch.arange(canvas.shape[1], device=canvas.device)
        seen = torch.cat([prefill.visible, places < canvas_lengths[:, None]], 1)  # (B, P + C)
        return self.denoise_seen(canvas, None if bool(seen.all()) else seen, prefill, soft, slots, share)

    def denoise_seen(
        self,
        canvas: Tensor,
        seen: Tensor | None,
        prefill: Prefill,
        soft: Tensor,
        slots: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Tensor:
        """As `denoise_hidden_from_soft`, without a look at values: nothing in it waits for the device.

        Args:
            canvas: (B, C) ids.
            seen: (B, P + C) bool, what every position of a row reads; None is all.
            prefill: of the same B rows.
            soft: (B, C, H).
            slots: (B, C, H) audio tokens and what language expects: hidden states that are added to the canvas's own.
            share: (B, C) of the canvas's own that counts beside them; None is all of it.
        """
        decoder = self.model.model.decoder
        scale = decoder.embed_tokens.embed_scale.to(soft.dtype)
        hidden = decoder.self_conditioning(decoder.embed_tokens(canvas), soft * scale)
        mask = None if seen is None else seen[:, None, None, :].expand(-1, 1, canvas.shape[1], -1)
        positions = prefill.first[:, None] + torch.arange(canvas.shape[1], device=canvas.device)
        rotary = {kind: decoder.rotary_emb(hidden, positions, kind) for kind in decoder.unique_layer_types}
        for layer, kind, (keys, values) in zip(decoder.layers, self.config.layer_types, prefill.layers(), strict=True):
            hidden = self.write_layer(layer, hidden, rotary[kind], mask, positions, keys, values)
        hidden = decoder.norm(hidden)
        if share is not None:
            hidden = hidden * share[..., None].to(hidden.dtype)
        return hidden if slots is None else hidden + slots.to(hidden.dtype)

    def denoise_logits(self, canvas: Tensor, prefill: Prefill, self_conditioning: Tensor | None = None) -> Tensor:
        """As `denoise_hidden` → (B, C, V) float32 logits, soft-capped."""
        return self.logits(self.denoise_hidden(canvas, prefill, self_conditioning))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) hidden states → (..., V) float32 logits, soft-capped."""
        return self.head.logits(hidden)
