"""Which models an evaluation runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..errors import LayerProbeError


def to_measure(model: Any, baseline: Any = None, *known: type) -> list[nn.Module]:
    """The model, and the baseline unless there is none or it is one of the `known` results.

    Raises:
        LayerProbeError: Something else than a model, such as its folder, or a comparison instead of its `.after`.
    """
    given = {"model": model}
    if baseline is not None and not isinstance(baseline, known):
        given["baseline"] = baseline
    for name, found in given.items():
        if isinstance(found, nn.Module):
            continue
        results = [each.__name__ for each in known if name == "baseline"]
        if isinstance(found, (str, Path)):
            advice = f"Load it first, for example AutoModelForCausalLM.from_pretrained({str(found)!r})."
        elif results and hasattr(found, "after"):
            advice = f"Pass {name}=comparison.after, or .before for the model that it was compared with."
        else:
            advice = f"Pass {name}= the model itself."
        raise LayerProbeError(
            f"{name} is a {type(found).__name__}; expected {' or '.join(['a loaded model', *results])}. {advice}"
        )
    return list(given.values())
