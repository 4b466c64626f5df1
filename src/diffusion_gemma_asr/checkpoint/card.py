"""The model card of a checkpoint: README.md with the header that hubs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub import ModelCard as HubCard

from ..model.config import ModelConfig

TASK = "automatic-speech-recognition"
NOT_MEASURED = "Not measured."


@dataclass(frozen=True)
class ModelCard:
    """What a checkpoint's README says beyond its settings."""

    training_data: str = "Not stated."  # Markdown: data sets, hours, licences
    results: Mapping[str, str] = field(default_factory=dict)  # test set → figure with its unit, e.g. "WER 12.3 %"
    limits: str = "Not stated."  # Markdown: what it is for, what it cannot do
    licence: str = "apache-2.0"  # of the adapter; the frozen parts keep their own


@dataclass(frozen=True)
class Score:
    """An error rate of a model.

    Attributes:
        data_set: its name.
        language: code.
        metric: of words or of characters.
        percent: the rate.
    """

    data_set: str
    language: str
    metric: Literal["wer", "cer"]
    percent: float


def card_data(model: ModelConfig, licence: str | None = None) -> ModelCardData:
    """The header of a card: library, task, languages, and the frozen parts that have a name on a hub."""
    # a folder of one machine means nothing to a hub
    parts = [name for name in (model.encoder.name, model.backbone.name) if name.count("/") == 1 and name[0] not in "./"]
    return ModelCardData(
        license=licence,
        library_name="diffusion-gemma-asr",
        pipeline_tag=TASK,
        language=list(model.languages),
        base_model=parts or None,
    )


def published_card(text: str, model: ModelConfig, scores: Sequence[Score] = ()) -> str:
    """A card as a hub is to have it.

    Args:
        text: README.md of the checkpoint.
        model: its config, which decides what the header says of it; other keys of the header stay.
        scores: become the header's model-index, and the table of results where nothing is there yet.
    """
    card = HubCard(text, ignore_metadata_errors=True)
    header = card.data.to_dict() | card_data(model).to_dict()
    if scores:
        header.pop("model-index", None)
        header |= {"model_name": model.name, "eval_results": [_eval_result(score) for score in scores]}
        rows = [
            f"| {score.data_set} | {score.language} | {score.metric.upper()} {score.percent:.2f} % |" for score in scores
        ]
        table = "\n".join(["| test set | language | result |", "|---|---|---|", *rows])
        card.text = card.text.replace(f"## Results\n\n{NOT_MEASURED}", f"## Results\n\n{table}")
    card.data = ModelCardData(**header)
    return str(card)


def _eval_result(score: Score) -> EvalResult:
    return EvalResult(
        task_type=TASK,
        dataset_type=score.data_set,
        dataset_name=score.data_set,
        dataset_config=score.language,
        metric_type=score.metric,
        metric_name=f"{score.metric.upper()} after Whisper's normaliser",
        metric_value=score.percent,
    )


def render_card(model: ModelConfig, card: ModelCard, trained_parameters: int) -> str:
    """Markdown for README.md.

    Args:
        model: encoder, backbone and settings as config.json has them.
        card: what only the one who trained it knows.
        trained_parameters: in the projector and LoRA together.
    """
    header = ["---", card_data(model, card.licence).to_yaml(), "---"]
    results = [f"| {name} | {value} |" for name, value in card.results.items()]
    table = ["| test set | result |", "|---|---|", *results] if results else [NOT_MEASURED]
    scaled, unscaled = "brought to the scale of the token embeddings", "as its linear layer gives it"
    scale = scaled if model.projector.scaled else unscaled
    stacks = "shared by both stacks" if model.lora.shared else "of both stacks"
    body = [
        f"# diffusion-gemma-asr: {model.name}",
        "",
        "Speech recognition with a diffusion language model as the decoder. This checkpoint holds the",
        f"trained adapter ({trained_parameters:,} parameters); the frozen parts are loaded by the names below.",
        "",
        f"- encoder, frozen: `{model.encoder.name}`{_at(model.encoder.revision)}",
        f"- backbone, frozen: `{model.backbone.name}`{_at(model.backbone.revision)}",
        f"- projector, trained: {model.projector.described}, output {scale}",
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
