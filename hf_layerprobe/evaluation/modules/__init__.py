"""Modules for the library `evaluate`, which loads them by their path."""

from pathlib import Path

from ...errors import LayerProbeError


def metric_path(name: str) -> str:
    """Where a module for `evaluate` is: `evaluate.load(metric_path("avss"))` needs no network.

    Args:
        name: avss, docs or perplexity.

    Raises:
        LayerProbeError: No such module.
    """
    folder = Path(__file__).parent
    known = sorted(path.parent.name for path in folder.glob("*/*.py"))
    if name not in known:
        raise LayerProbeError(f"There is no module {name!r} for evaluate; there are {', '.join(known)}.")
    return str(folder / name)
