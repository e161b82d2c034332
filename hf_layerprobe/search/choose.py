"""Which layers a rule chooses: by a score, by a search, or by whichever of several measures best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..activations import batches
from ..activations.data import check_positive, text_rows
from ..activations.fingerprint import used_text
from ..activations.text import Batch
from ..errors import LayerProbeError
from ..scores import LayerScores, score_layers
from ..scores.combined import NAME as COMBINED
from ..scores.combined import PARTS, combined
from ..scores.loss import check_causal
from ..scores.registry import SCORES, get_score, nearest
from ..scores.run import ALIASES, PASS_OPTIONS
from ..stacks import LayerStack
from ..stacks.admissible import can_go, first_admissible, least_worth
from .losses import SetLosses
from .rules import RULES, refine

# What `by="auto"` measures against each other: cheap rules, each with its own blind spot, and the best single block.
AUTO_RULES = ("avss-relative", "influence", "docs", "last", COMBINED)
AUTO_SEARCHES = ("contiguous",)
# With a budget, the slower searches too.
BUDGET_SEARCHES = ("contiguous", "greedy")
# Tokens that a set is measured on in a search: many sets, so few tokens.
SEARCH_TOKENS = 2048
SEARCH_OPTIONS = ("minutes", "resume")
NEEDS = (
    "by={by!r} measures several sets of layers on text, so it needs data= with at least two texts, and tokenizer=. Without "
    "data, by='docs' ranks by the weights alone."
)
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Choice:
    """The layers that a rule chooses.

    Attributes:
        remove: Layers to remove.
        by: The rule.
        note: Why others than the lowest, where a score's lowest layers cannot go together.
        scores: The score behind it, if there is one.
        candidates: Every set that was measured on held-out text, for `"auto"`.
        path: Of a greedy search, the best set found of each size with its loss, from none on.
        data: What it was made from (`calibration`), and for `"auto"` measured on (`held_out`): tokens, fingerprint.
    """

    remove: tuple[int, ...]
    by: str
    note: str = ""
    scores: LayerScores | None = None
    candidates: list[dict[str, Any]] = field(default_factory=list)
    path: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def choose(stack: LayerStack, data: Any, number: int, by: str, tokenizer, options: dict[str, Any]) -> Choice:
    """The `number` layers that a rule would remove; see [`plan_pruning`] for the arguments."""
    choices = ("auto", COMBINED, *RULES, *ALIASES, *sorted(SCORES))
    if by not in choices:
        raise LayerProbeError(f"Unknown rule by={by!r}.{nearest(by, choices)} Expected one of {', '.join(choices)}.")
    if by == "auto" or by in RULES:
        known = (*SEARCH_OPTIONS, *PASS_OPTIONS)
        if other := [name for name in options if name not in known]:
            raise LayerProbeError(
                f"by={by!r} has no option {other[0]!r}.{nearest(other[0], known)} Its options: {', '.join(known)}."
            )
    if by == "auto":
        return _auto(stack, data, number, tokenizer, options)
    if by in RULES:
        return _search(stack, _texts(data, tokenizer, by), number, by, tokenizer, options)
    if by == COMBINED:
        if data is None:
            raise LayerProbeError(f"by={by!r} is half measured on activations, so data is needed (data=, tokenizer=).")
        parts = [
            score_layers(stack.model, data, by=name, stack=stack, tokenizer=tokenizer, **options)
            if get_score(name).needs_data
            else score_layers(stack.model, by=name, stack=stack)
            for name in PARTS
        ]
        scores = combined(*parts)
    else:
        scores = score_layers(stack.model, data, by=by, stack=stack, tokenizer=tokenizer, **options)
    removed, note = least_important(stack, scores, number)
    return Choice(tuple(removed), scores.name, note, scores, data={"calibration": scores.data} if scores.data else {})


def least_important(stack: LayerStack, scores: LayerScores, number: int) -> tuple[list[int], str]:
    """The least important layers that can go together, and why they are others than the lowest ones."""
    lowest = scores.least_important(number)
    if not isinstance(stack.model, PreTrainedModel):  # scores can be had of anything, and plans for it made by hand
        return lowest, ""
    if blocks := scores.blocks(number):
        return first_admissible(stack, blocks)
    return least_worth(stack, scores.importance, number)


def _texts(data: Any, tokenizer, by: str) -> list[str]:
    needs = NEEDS.format(by=by)
    try:
        texts = [text for text in text_rows(data) if text.strip()]
    except LayerProbeError as error:
        raise LayerProbeError(f"{needs} {error}") from error
    if len(texts) < 2 or tokenizer is None:
        found = f"Got {len(texts)} texts that are not empty{', and no tokenizer' if tokenizer is None else ''}."
        raise LayerProbeError(f"{needs} {found}")
    return texts


def _batches(
    stack: LayerStack, texts: Iterable[str], tokenizer, options: dict[str, Any], most: int | None
) -> tuple[list[Batch], dict[str, Any]]:
    """Batches to measure sets on, and what a plan says of them."""
    reading = {name: value for name, value in options.items() if name not in (*SEARCH_OPTIONS, "max_tokens")}
    limit = options.get("max_tokens")
    if limit is not None:
        check_positive(max_tokens=limit)
    limit = min((each for each in (limit, most) if each is not None), default=None)
    read = batches(texts, stack.model, tokenizer, max_tokens=limit, **reading)
    rows = list(read)
    return rows, {**used_text(rows, stack.model), **read.choices}


def _search(
    stack: LayerStack, texts: Sequence[str], number: int, by: str, tokenizer, options: dict[str, Any]
) -> Choice:
    searching = {name: options[name] for name in SEARCH_OPTIONS if name in options}
    rows, used = _batches(stack, texts, tokenizer, options, SEARCH_TOKENS)
    found = RULES[by](SetLosses(stack, rows, **searching), number, lambda removed: can_go(stack, removed))
    return Choice(found.removed, by, path=found.path, data={"calibration": used})


def _auto(stack: LayerStack, data: Any, number: int, tokenizer, options: dict[str, Any]) -> Choice:
    """The choice with the lowest loss on texts that no choice was made from."""
    texts = list(dict.fromkeys(_texts(data, tokenizer, "auto")))  # what is there twice may be in one half only
    if len(texts) < 2:
        raise LayerProbeError(f"{NEEDS.format(by='auto')} All that are not empty are the same.")
    check_causal(stack.model)
    calibration, held_out = texts[::2], texts[1::2]
    scoring = {name: value for name, value in options.items() if name not in SEARCH_OPTIONS}
    choices = _by_score(stack, calibration, number, tokenizer, scoring)
    searching = {name: options[name] for name in SEARCH_OPTIONS if name in options}
    searched, used_in_search = _batches(stack, calibration, tokenizer, options, SEARCH_TOKENS)
    losses = SetLosses(stack, searched, **searching)

    def admissible(removed: Sequence[int]) -> bool:
        return can_go(stack, removed)

    for rule in BUDGET_SEARCHES if "minutes" in options else AUTO_SEARCHES:
        try:
            found = RULES[rule](losses, number, admissible)
        except LayerProbeError as error:  # no such set, or no time left; the other rules do without it
            logger.warning(f"by='auto' goes on without the rule {rule!r}: {error}")
            continue
        choices.append(Choice(found.removed, rule, path=found.path))
    if "minutes" in options and not losses.out_of_time:
        losses.measure([choice.remove for choice in choices], desc="Plans")
        start = min((c.remove for c in choices if c.remove in losses.known), key=losses.known.get)
        choices.append(Choice(refine(losses, start, admissible), "swaps"))
    rows, used_held_out = _batches(stack, held_out, tokenizer, options, None)
    measured = SetLosses(stack, rows)
    held_out_loss = measured.measure([choice.remove for choice in choices], desc="Measuring plans")
    candidates = [
        {"by": choice.by, "remove": list(choice.remove), "held_out_loss": held_out_loss[choice.remove]}
        for choice in choices
    ]
    best = min(choices, key=lambda choice: held_out_loss[choice.remove])
    if not isfinite(held_out_loss[best.remove]):
        raise LayerProbeError(
            f"The held-out loss without any of the {number} layers that the rules choose is not finite. Run the model in float32 "
            "or bfloat16, or remove fewer layers."
        )
    scored = [choice.scores.data for choice in choices if choice.scores and choice.scores.data]
    used = {"calibration": scored[0] if scored else used_in_search, "held_out": used_held_out}
    return Choice(best.remove, "auto", best.note, best.scores, candidates, best.path, used)


def _by_score(stack: LayerStack, calibration: Sequence[str], number: int, tokenizer, options) -> list[Choice]:
    """A choice by each cheap score, the combination of two of them included."""
    names = [name for name in AUTO_RULES if name != COMBINED]
    streamed = [name for name in names if get_score(name).needs_data]
    scores = score_layers(stack.model, calibration, by=streamed, stack=stack, tokenizer=tokenizer, **options)
    for name in names:
        if name not in scores:
            try:
                scores[name] = score_layers(stack.model, by=name, stack=stack)
            except LayerProbeError as error:  # matrices of an unknown layout; the other rules do without them
                logger.warning(f"by='auto' goes on without the rule {name!r}: {error}")
    if all(name in scores for name in PARTS):
        scores[COMBINED] = combined(*(scores[name] for name in PARTS))
    choices = []
    for name in AUTO_RULES:
        if name in scores:
            removed, note = least_important(stack, scores[name], number)
            choices.append(Choice(tuple(removed), name, note, scores[name]))
    return choices
