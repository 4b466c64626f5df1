"""The model card of a checkpoint: README.md with the header that hubs read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..model.config import ModelConfig


@dataclass(frozen=True)
class ModelCard:
    """What a checkpoint's README says beyond its settings."""

    training_data: str = "Not stated."  # Markdown: data sets, hours, licences
    results: Mapping[str, str] = field(default_factory=dict)  # test set → figure with its unit, e.g. "WER 12.3 %"
    limits: str = "Not stated."  # Markdown: what it is for, what it cannot do
    licence: str = "apache-2.0"  # of the adapter; the frozen parts keep their own


def render_card(model: ModelConfig, card: ModelCard, trained_parameters: int) -> str:
    """Markdown for README.md.

    Args:
        model: encoder, backbone and settings as config.json has them.
        card: what only the one who trained it knows.
        trained_parameters: in the projector and LoRA together.
    """
    # a folder of one machine means nothing to a hub
    names = (model.encoder.name, model.backbone.name)
    parts = [name for name in names if name.count("/") == 1 and name[0] not in "./"]
    header = [
        "---",
        f"license: {card.licence}",
        "library_name: diffusion-gemma-asr",
        "pipeline_tag: automatic-speech-recognition",
        "language:",
        *(f"- {code}" for code in model.languages),
        *(["base_model:", *(f"- {name}" for name in parts)] if parts else []),
        "---",
    ]
    results = [f"| {name} | {value} |" for name, value in card.results.items()]
    table = ["| test set | result |", "|---|---|", *results] if results else ["Not measured."]
    scaled, unscaled = "brought to the scale of the token embeddings", "as its linear layer gives it"
    scale = scaled if model.projector.scaled else unscaled
    shape, stacks = model.projector, "shared by both stacks" if model.lora.shared else "of both stacks"
    deep = f", {shape.layers} layers of width {shape.layer_width}" if shape.layers else ""
    body = [
        f"# diffusion-gemma-asr: {model.name}",
        "",
        "Speech recognition with a diffusion language model as the decoder. This checkpoint holds the",
        f"trained adapter ({trained_parameters:,} parameters); the frozen parts are loaded by the names below.",
        "",
        f"- encoder, frozen: `{model.encoder.name}`{_at(model.encoder.revision)}",
        f"- backbone, frozen: `{model.backbone.name}`{_at(model.backbone.revision)}",
        f"- projector, trained: {shape.hidden_size} channels{deep}, output {scale}",
        f"- LoRA, trained: rank {model.lora.rank}, alpha {model.lora.alpha}, on q, k, v, o {stacks}",
        f"- languages: {', '.join(model.languages)}",
        "",
        "```python",
        "import diffusion_gemma_asr as asr",
        "",
        'model = asr.load("this folder or repository")',
        'print(model.transcribe("talk.mp3").text)',
        "```",
        "",
        "## Training data",
        "",
        card.training_data,
        "",
        "## Results",
        "",
        *table,
        "",
        "## Intended use and limits",
        "",
        card.limits,
    ]
    return "\n".join([*header, "", *body]) + "\n"


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at `{revision}`"
