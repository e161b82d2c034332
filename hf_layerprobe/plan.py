"""Which layers go, and why: a plan that can be read, checked, stored and replayed."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .errors import LayerProbeError, PruningError
from .files import write_atomically
from .hub import PLAN_FILE, fetch_file, is_repo_id
from .search import Choice, Curve, choose
from .stacks import LayerStack, resolve_stack
from .stacks.admissible import expressible
from .weights.checksum import Read, sign_checksum

logger = logging.get_logger(__name__)
# JSON has no such numbers: in a plan's file they are text.
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class PruningPlan:
    """The layers to keep and to remove, 0-based indices of the original model, with the reason.

    Attributes:
        stack: Path of the stack.
        num_layers: Layers in the original stack.
        remove: Layers that go, ascending.
        keep: Layers that stay, ascending.
        by: The rule: a score's name, "auto" or "explicit".
        scores: The score behind the choice (`LayerScores.to_dict()`), if there was one.
        candidates: For "auto": every plan that was measured, with its held-out loss in nats a token.
        path: Of a greedy search, the best set of each size that can go, with its loss on the calibration text; see [`curve`].
        data: What the choice was made from (`calibration`), and for "auto" measured on (`held_out`): number of tokens,
            fingerprint, options. Empty where no data were used.
        note: Why other layers go than those with the lowest scores, where the architecture cannot lose these.
        repair: What a repair of the pruned model did (`repair_model`), if there was one.
        also: Plans for further stacks of the same model, to be carried out together with this one.
        model: Class and type of the model that the plan was made for, and a checksum of its layers.
        versions: Versions of the packages that made it.
    """

    stack: str
    num_layers: int
    remove: tuple[int, ...]
    keep: tuple[int, ...]
    by: str
    scores: dict[str, Any] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    path: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    repair: dict[str, Any] = field(default_factory=dict)
    also: tuple[PruningPlan, ...] = ()
    model: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[PruningPlan, ...]:
        """One plan a stack: this one and those in `also`."""
        return (self, *self.also)

    def __str__(self) -> str:
        return "; ".join(
            f"{part.stack}: remove {len(part.remove)} of {part.num_layers} layers by {part.by} "
            f"(0-based): remove {list(part.remove)}, keep {list(part.keep)}"
            for part in self.parts
        )

    def curve(self) -> Curve:
        """The loss against the number of layers removed, with its knee: how many to remove.

        Raises:
            LayerProbeError: The plan was not made by a greedy search, which is what goes through all numbers.
        """
        if not self.path:
            raise LayerProbeError(
                f"This plan was made by {self.by!r}, which measured one number of layers only. Make one by='greedy' or 'beam' "
                "with the largest number of layers to consider; its curve goes from 0 to there."
            )
        return Curve.of(self.path)

    def checksum(self) -> str:
        """SHA-256 of the plan's content."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as strict JSON, with `"NaN"`, `"Infinity"` and `"-Infinity"` as texts."""
        content = json.loads(json.dumps(asdict(self)), parse_constant=str)
        return json.dumps({**content, "checksum": self.checksum()}, indent=2, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Writes the plan to a file, or as `pruning_plan.json` into an existing folder."""
        path = Path(path)
        path = path / PLAN_FILE if path.is_dir() else path
        write_atomically(path, self.to_json())
        return path

    @classmethod
    def _from_dict(cls, content: Mapping[str, Any]) -> PruningPlan:
        layers = {name: tuple(content[name]) for name in ("remove", "keep")}
        return cls(**{**content, **layers, "also": tuple(cls._from_dict(each) for each in content.get("also", ()))})

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Reads a plan from a file, or from the folder of a pruned model.

        Raises:
            LayerProbeError: Not a plan, or one that was changed after it was written.
        """
        path = Path(path)
        path = path / PLAN_FILE if path.is_dir() else path
        if not path.is_file():
            raise LayerProbeError(f"No pruning plan at {path}.")
        try:
            content = _with_numbers(json.loads(path.read_text(encoding="utf-8")))
            checksum = content.pop("checksum")
            plan = cls._from_dict(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LayerProbeError(f"{path} is not a pruning plan ({type(error).__name__}: {error}).") from error
        if plan.checksum() != checksum:
            raise LayerProbeError(
                f"{path} was changed after it was written: its checksum is {checksum[:12]}…, its content gives "
                f"{plan.checksum()[:12]}…. Make the plan again instead of editing it."
            )
        return plan

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> PruningPlan:
        """Reads the plan of a pruned model.

        Args:
            name_or_path: The folder of a pruned model, a plan's file, or the Hub id of a pruned model.
            revision: Branch, tag or commit, on the Hub.
            token: The token for the Hub, where the one of `hf auth login` or `HF_TOKEN` is not meant.

        Raises:
            LayerProbeError: See [`load`]; neither a folder nor a Hub id, or no plan in that repository.
        """
        if Path(name_or_path).exists():
            return cls.load(name_or_path)
        if not is_repo_id(str(name_or_path)) or str(name_or_path).endswith(".json"):
            raise LayerProbeError(
                f"No pruning plan at {str(name_or_path)!r}: there is no such file or folder, and it is no Hub id ('user/name')."
            )
        return cls.load(fetch_file(str(name_or_path), PLAN_FILE, revision=revision, token=token))

    def check_fits(self, stack: LayerStack, read: Read | None = None) -> None:
        """Refuses a model that the plan was not made for.

        Args:
            stack: The layers that the plan is to be carried out on.
            read: Reads their values by name, where they are in files; see [`sign_checksum`].

        Raises:
            PruningError: Another number of layers, or other weights than the plan was made from.
        """
        if stack.num_layers != self.num_layers:
            raise PruningError(
                f"The plan was made for {self.num_layers} layers in {self.stack!r}; this model has {stack.num_layers} there."
            )
        made_for, found = self.model.get("checksum"), sign_checksum(stack, read)
        if made_for and found and made_for != found:
            raise PruningError(
                f"The plan was made for another model: the checksum of the layers it was made for ({self.model.get('class')}) is "
                f"{made_for[:12]}…, that of the layers of this {type(stack.model).__name__} is {found[:12]}…. Make a plan for this "
                f"model, or remove the same layers by name: remove={list(self.remove)}."
            )


def _with_numbers(content: Any) -> Any:
    """What a plan's file holds, with the numbers that are text there."""
    if isinstance(content, dict):
        return {name: _with_numbers(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_with_numbers(value) for value in content]
    return NOT_FINITE.get(content, content) if isinstance(content, str) else content


def plan_pruning(
    model: nn.Module,
    data: Any = None,
    *,
    ratio: float | None = None,
    num_layers: int | None = None,
    remove: Iterable[int] | Mapping[str, Iterable[int]] | None = None,
    keep: Iterable[int] | Mapping[str, Iterable[int]] | None = None,
    by: str = "auto",
    stack: str | LayerStack | Sequence[str | LayerStack] | None = None,
    tokenizer=None,
    **options: Any,
) -> PruningPlan:
    """Decides which layers to remove. Exactly one of `ratio`, `num_layers`, `remove` and `keep` says how many.

    The plan of a `PreTrainedModel` can be carried out: sets that its architecture cannot express are refused
    (`LayerStack.check`), and a rule chooses the least important layers among the sets that it can.

    Args:
        model: The model; left as it was.
        data: Calibration data for scores that need it; see [`score_layers`]. `by="auto"` needs texts.
        ratio: Share of the layers to remove, rounded down: a quarter of 30 layers is 7.
        num_layers: Number of layers to remove.
        remove: Indices (0-based) of the layers to remove; negative ones count from the end. For several stacks at once, a
            dict of such lists by path: `{"encoder.block": [1], "decoder.block": [2]}`.
        keep: Indices of the layers to keep, or a dict of them.
        by: A registered score, whose least important layers go; "combined", our own mean rank of DOCS redundancy and relative
            AVSS; a search that measures the loss without sets of layers: "contiguous" (the best block), "greedy" (one layer
            after the other) or "beam" (several sets at a time); or "auto", which makes a plan by each of several rules,
            measures every plan on the half of the texts that it was not made from, and takes the best.
        stack: Path of the stack; the main one by default. With `ratio` or `num_layers`, several: each loses so much.
        tokenizer: Needed for texts.
        options: Options of [`score_layers`]. Searches and "auto" also take `minutes`, a budget, with which "auto" also
            tries greedy removal and swaps around the best set, and `resume`, a file that keeps what was measured. A search
            reads 2,048 tokens at most, whatever `max_tokens` is.

    Raises:
        PruningError: Nothing or everything would be removed, an index is out of range, the request is ambiguous, or the
            architecture cannot express it (`.nearest` has the kept sets that it can).
        LayerProbeError: Unknown score, data that is missing or unusable, or options that would have no effect.
    """
    requests = _by_stack(model, stack, {"remove": remove, "keep": keep})
    plans = [
        _plan_one(
            model, data, ratio=ratio, num_layers=num_layers, by=by, stack=found, tokenizer=tokenizer, **given, **options
        )
        for found, given in requests
    ]
    if isinstance(requests[0][0].model, PreTrainedModel):
        expressible({found: plan.keep for (found, _), plan in zip(requests, plans, strict=True)})
    return replace(plans[0], also=tuple(plans[1:]))


def _by_stack(model: nn.Module, stack, given: dict[str, Any]) -> list[tuple[LayerStack, dict[str, Any]]]:
    """Every stack that loses layers, with the layers asked for."""
    named = {name: value for name, value in given.items() if isinstance(value, Mapping)}
    several = isinstance(stack, Iterable) and not isinstance(stack, str)
    if not named and not several:
        return [(resolve_stack(model, stack), given)]
    name, layers = next(iter(named.items()), (None, None))
    if named and (stack is not None or sum(value is not None for value in given.values()) > 1):
        raise PruningError(f"{name} names its stacks itself; leave out stack= and whatever else says what to remove.")
    if several and any(value is not None for value in given.values()):
        raise PruningError("For several stacks, remove= or keep= is a dict of lists by path, and stack= is left out.")
    found = [(resolve_stack(model, path), {name: layers[path]} if named else {}) for path in (layers or stack or ())]
    paths = [each.path for each, _ in found]
    if not paths or len(set(paths)) < len(paths):
        raise PruningError(f"Name at least one stack, and each once; got {paths or 'none'}.")
    return found


def _plan_one(
    model, data, *, by, stack: LayerStack, tokenizer, ratio=None, num_layers=None, remove=None, keep=None, **options
) -> PruningPlan:
    total = stack.num_layers
    removed = requested(total, ratio, num_layers, remove, keep)
    if not isinstance(by, str):
        raise LayerProbeError(f"by is one rule: 'auto' or the name of a score; got {by!r}.")
    if not isinstance(removed, int):
        refuse_options(options, "which layers go is given by remove= or keep=, and no score is computed")
        chosen = Choice(tuple(removed), "explicit")
    else:
        chosen = choose(stack, data, removed, by, tokenizer, options)
    if chosen.note:
        logger.warning(f"by={by!r} removes layers {list(chosen.remove)} of {stack.path!r} instead: {chosen.note}.")
    return PruningPlan(
        stack=stack.path,
        num_layers=total,
        remove=chosen.remove,
        keep=tuple(i for i in range(total) if i not in chosen.remove),
        by=chosen.by,
        scores=chosen.scores.to_dict() if chosen.scores else {},
        candidates=chosen.candidates,
        path=chosen.path,
        data=chosen.data,
        note=chosen.note,
        model={
            "class": type(stack.model).__name__,
            "model_type": getattr(getattr(stack.model, "config", None), "model_type", ""),
            "checksum": sign_checksum(stack) or "",
        },
        versions={name: version(name) for name in ("hf-layerprobe", "transformers", "torch")},
    )


def to_carry_out(plan: Any, *, token: str | bool | None = None) -> PruningPlan:
    """A plan as [`opened_plan`] gives it, without the record of what was repaired after it."""
    parts = [replace(part, repair={}) for part in opened_plan(plan, token=token).parts]
    return replace(parts[0], also=tuple(parts[1:]))


def opened_plan(plan: Any, *, token: str | bool | None = None) -> PruningPlan:
    """A plan that is given as such, or by its file, folder or Hub id.

    Raises:
        PruningError: Something else.
        LayerProbeError: See [`PruningPlan.from_pretrained`].
    """
    if isinstance(plan, (str, Path)):
        plan = PruningPlan.from_pretrained(plan, token=token)
    if not isinstance(plan, PruningPlan):
        raise PruningError(
            f"plan is a {type(plan).__name__}; expected a PruningPlan, or the file, folder or Hub id of one. To name layers, write "
            "remove=[...] or keep=[...]."
        )
    return plan


def refuse_options(options: Mapping[str, Any], why: str) -> None:
    """Refuses options that would have no effect; most are misspelled names of others.

    Raises:
        LayerProbeError: There are some.
    """
    if options:
        raise LayerProbeError(f"Unused options {sorted(options)}: {why}. Check their names, or leave them out.")


def requested(total: int, ratio, num_layers, remove=None, keep=None) -> int | list[int]:
    """How many layers to remove, or which ones."""
    given = {
        name: value
        for name, value in (("ratio", ratio), ("num_layers", num_layers), ("remove", remove), ("keep", keep))
        if value is not None
    }
    if len(given) != 1:
        raise PruningError(
            f"Say how much to remove by exactly one of ratio, num_layers, remove and keep; got {', '.join(given) or 'none'}."
        )
    if ratio is not None:
        if not isinstance(ratio, numbers.Real) or not 0 < ratio < 1:
            raise PruningError(f"ratio is the share of layers to remove, between 0 and 1; got {ratio!r}.")
        num_layers = int(ratio * total + 1e-9)
        if num_layers == 0:
            raise PruningError(f"ratio={ratio} of {total} layers is less than one layer; use at least {1 / total:.3f}.")
    if num_layers is not None:
        if not _is_index(num_layers) or not 0 < num_layers < total:
            raise PruningError(
                f"num_layers to remove must be between 1 and {total - 1} of {total}; got {num_layers!r}."
            )
        return operator.index(num_layers)
    name, indices = ("remove", remove) if remove is not None else ("keep", keep)
    if not isinstance(indices, Iterable) or isinstance(indices, (str, bytes)):
        raise PruningError(f"{name} is a list of layers, such as [3]; got {indices!r}.")
    indices = list(indices)
    wrong = [i for i in indices if not _is_index(i) or not -total <= i < total]
    if wrong:
        raise PruningError(f"{name}: layers {wrong} do not exist; the stack has layers 0 to {total - 1}.")
    chosen = {operator.index(i) % total for i in indices}
    if len(chosen) != len(indices):
        raise PruningError(f"{name} names a layer twice: {indices}.")
    removed = sorted(chosen) if remove is not None else [i for i in range(total) if i not in chosen]
    if not removed:
        raise PruningError(f"{name}={indices} removes no layer of {total}.")
    if len(removed) == total:
        raise PruningError(f"{name}={indices} removes all {total} layers; at least one must stay.")
    return removed


def _is_index(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
