"""The model card of a pruned model, from its plan, the card of the model it came from, and what was measured."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import HubError, LayerProbeError
from ..evaluation import Comparison
from ..evaluation.answers import TaskComparison, TaskResult
from ..files import write_atomically
from ..hub import fetch_file, is_repo_id, was_downloaded
from ..plan import PruningPlan
from ..scores import LayerScores
from .figures import depth_plot

TEMPLATE = Path(__file__).with_name("card_template.md")
CARD, FIGURE = "README.md", "figures/scores_by_depth.png"
TAGS = ("layer-pruning", "hf_layerprobe")
# What a pruned model inherits from the card of the model that it came from.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
logger = logging.get_logger(__name__)


def model_card(
    folder: str | Path,
    *,
    base_model: str | None = None,
    results: Mapping[str, Comparison | TaskComparison] | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """Makes the card of a pruned model: `model_card("smaller", results={"WikiText-2": comparison}).save("smaller/README.md")`.

    Licence, language and task are those of the card that the folder has already, which [`prune_layers`] made from the card
    of the model before pruning.

    Args:
        folder: The folder of the pruned model, with its `pruning_plan.json`.
        base_model: Hub id of the model before pruning, or of one that it was derived from; by default the one in the folder's
            card.
        results: Comparisons of [`evaluate_model`], [`evaluate_choices`] and the like by the name of the data that they were measured on. A name such as
            `"Salesforce/wikitext"` is taken as a data set's Hub id too.
        repo_id: Where the model will be on the Hub, for the examples.

    Raises:
        LayerProbeError: No pruned model in the folder, a Hub id that is none, or results that cannot be reported.
    """
    folder = Path(folder)
    plan = PruningPlan.load(folder)
    card = folder / CARD
    try:
        inherited = _data(card) if card.is_file() else ModelCardData()
    except (yaml.YAMLError, ValueError) as error:
        raise LayerProbeError(
            f"The metadata of {card} cannot be read: {error}. Correct or remove that file."
        ) from error
    return _render(folder, plan, inherited, base_model or inherited.get("base_model"), results or {}, repo_id)


def write_card(folder: Path, original: PreTrainedModel, repo_id: str | None = None) -> None:
    """Writes the card, and the figure in it, into the folder of a pruned model that has its plan already."""
    plan = PruningPlan.load(folder)
    scores = [
        LayerScores(**{**part.scores, "values": np.array(part.scores["values"], dtype=float), "details": {}})
        for part in plan.parts
        if part.scores
    ]
    if scores:
        (folder / FIGURE).parent.mkdir(exist_ok=True)
        depth_plot(scores, folder / FIGURE)
    base_model, inherited = _origin(original)
    inherited.tags = None  # what others say of the original (a format, a library) need not hold for this model
    write_atomically(folder / CARD, str(_render(folder, plan, inherited, base_model, {}, repo_id)))


def _origin(model: PreTrainedModel) -> tuple[str | list[str] | None, ModelCardData]:
    """The Hub id of a model, where it has one, and the data of its card."""
    name = model.config.name_or_path
    try:
        if name and Path(name).exists():
            card = Path(name) / CARD
            # A model of one's own: what its card says that it was made from. Never its path.
            data = _data(card) if card.is_file() else ModelCardData()
            return _ids(data.get("base_model"), card), data
        if not was_downloaded(name):
            return None, ModelCardData()
        return name, _data(fetch_file(name, CARD))
    except (HubError, yaml.YAMLError, ValueError) as error:
        logger.warning(f"The licence and language of {name!r} cannot be carried over to the model card: {error}")
        return (name if was_downloaded(name) else None), ModelCardData()


def _ids(named: Any, card: Path) -> str | list[str] | None:
    """The Hub ids among what a card says that a model was made from; Trainers also write folders there."""
    names = named if isinstance(named, list) else [] if named is None else [named]
    kept = [name for name in names if isinstance(name, str) and is_repo_id(name)]
    if len(kept) < len(names):
        logger.warning(
            f"base_model in {card.name} of the model names {len(names) - len(kept)} that are no Hub ids; left out."
        )
    return kept if isinstance(named, list) and kept else kept[0] if kept else None


def _data(card: Path) -> ModelCardData:
    return ModelCard.load(card, ignore_metadata_errors=True).data


def _render(
    folder: Path,
    plan: PruningPlan,
    inherited: ModelCardData,
    base_model: str | list[str] | None,
    results: Mapping[str, Comparison | TaskComparison],
    repo_id: str | None,
) -> ModelCard:
    for name in [base_model] if isinstance(base_model, str) else base_model or []:
        if not is_repo_id(name):
            raise LayerProbeError(
                f"base_model={name!r} is no Hub id; expected one such as 'HuggingFaceTB/SmolLM2-135M'."
            )
    measured = [row for name, comparison in results.items() for row in _measured(name, comparison)]
    class_name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures", ["the model"])[0]
    task, auto_class = _task(folder, class_name)
    base = base_model if isinstance(base_model, str) else None
    # Not "of so many": the model before pruning may have been tuned or pruned from the base before.
    title = (
        f"{base.split('/')[-1] if base else class_name} pruned to {sum(len(part.keep) for part in plan.parts)} layers"
    )
    carried = {name: inherited.get(name) for name in INHERITED if inherited.get(name) is not None}
    if base_model:
        # The Hub knows finetune, adapter, merge and quantized; other weights of the same kind are listed as the first.
        carried |= {"base_model": base_model, "base_model_relation": "finetune"}
    data = ModelCardData(
        library_name="transformers",
        tags=[*(inherited.tags or []), *TAGS],
        eval_results=[_eval_result(row) for row in measured] or None,
        model_name=title if measured else None,
        **({"pipeline_tag": task} if task else {}) | carried,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        base=f"[{base}](https://huggingface.co/{base})" if base else None,
        class_name=class_name,
        auto_class=auto_class,
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
        repo_id=repo_id,
        parts=plan.parts,
        repaired=[part for part in plan.parts if part.repair.get("kept")],
        rules=[_rule(part) for part in plan.parts],
        adapters=sorted(path.name for path in (folder / "adapters").glob("*")),
        checksum=plan.checksum(),
        figure=FIGURE if (folder / FIGURE).is_file() else None,
        calibration=plan.data.get("calibration") or plan.scores.get("data"),
        results=measured,
        versions=plan.versions,
    )


def _task(folder: Path, class_name: str) -> tuple[str | None, str]:
    """The task of a model, and the Auto class that loads it: its own class, where no Auto class gives just that."""
    from optimum.exporters.tasks import TasksManager

    try:
        task = TasksManager.infer_task_from_model(getattr(transformers, class_name))
        config = AutoConfig.from_pretrained(folder)
        auto_class = TasksManager.get_model_class_for_task(task, model_type=config.model_type)
        found = auto_class._model_mapping[type(config)]
    except (AttributeError, KeyError, ValueError):  # a class or task that optimum does not know
        return None, class_name
    found = found if isinstance(found, tuple) else (found,)
    return task, auto_class.__name__ if class_name in {each.__name__ for each in found} else class_name


def _rule(plan: PruningPlan) -> str:
    if plan.by == "explicit":
        return "hand"
    source = f"`{plan.scores.get('name', plan.by)}` ({plan.scores.get('source', 'by the loss without sets of layers')})"
    source = f"{source}, the best of several plans" if plan.by == "auto" else source
    return f"{source}; {plan.note}" if plan.note else source


@dataclass(frozen=True)
class Measured:
    """One number of the card: what was measured, on which data, of which model."""

    data: str
    which: str
    metric: str
    value: float
    amount: str


def _measured(name: str, comparison: Comparison | TaskComparison) -> Iterator[Measured]:
    if not isinstance(comparison, (Comparison, TaskComparison)):
        raise LayerProbeError(
            f"results maps names of data to comparisons of evaluate_model and the like; {name!r} has a "
            f"{type(comparison).__name__}."
        )
    for which, found in (("before pruning", comparison.before), ("after pruning", comparison.after)):
        if isinstance(found, TaskResult):
            yield Measured(name, which, found.metric, found.value, f"{found.items:,} items")
        elif found is not None:
            for metric in ("perplexity", "bits_per_byte"):
                yield Measured(name, which, metric, getattr(found, metric), f"{found.tokens:,} tokens")


def _eval_result(row: Measured) -> EvalResult:
    is_id = "/" in row.data and is_repo_id(row.data)
    return EvalResult(
        task_type="text-generation",
        dataset_type=row.data if is_id else re.sub(r"[^a-z0-9]+", "-", row.data.lower()).strip("-"),
        dataset_name=row.data,
        metric_type=row.metric,
        metric_name=f"{row.metric.replace('_', ' ')} {row.which}",
        metric_value=round(row.value, 4) if math.isfinite(row.value) else str(row.value),
    )
