"""Warns when a model is to be measured on what it was pruned or repaired by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..activations import batches
from ..activations.fingerprint import used_text
from ..errors import LayerProbeError
from ..plan import PruningPlan

logger = logging.get_logger(__name__)


def warn_if_seen(
    texts: Sequence[str], plan: PruningPlan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Compares the texts, all of them or every other one (or fourth, of a half that was halved again), with the fingerprints
    of the data in a plan, packed or not where the plan does not say."""
    parts = [part for part in (texts, texts[::2], texts[1::2], texts[::4], texts[2::4]) if part]
    for what, used in _used(plan):
        reading = {"max_length": used.get("max_length", 512), "max_tokens": used["tokens"]}
        for part, pack in product(parts, [used["packed"]] if "packed" in used else [True, False]):
            try:
                found = used_text(batches(part, model, tokenizer, pack=pack, **reading), model)
            except LayerProbeError:  # not one of these texts is as short as what was used
                continue
            if found["fingerprint"] == used["fingerprint"]:
                logger.warning(
                    f"These texts are the plan's own {what} data, so what is measured on them flatters the pruned model. "
                    "Evaluate on texts that neither plan nor repair has seen."
                )
                return


def _used(plan: PruningPlan) -> Iterator[tuple[str, dict[str, Any]]]:
    for part in plan.parts:
        entries = {**part.data, "repair": part.repair.get("data", {})}
        yield from ((what, used) for what, used in entries.items() if "tokens" in used and "fingerprint" in used)
