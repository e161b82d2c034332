"""The list of model types that were tried: which can be pruned, which are refused and why.

It is written by `python -m tests.conformance --write` alone, which builds a tiny random model of every type, prunes it in
several ways, reloads it and compares; a checksum shows whether anything else has touched it.
"""

from __future__ import annotations

import hashlib
import json
from difflib import get_close_matches
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from .errors import LayerProbeError
from .files import write_atomically

NAME = "supported_models.json"
WRITTEN_BY = "python -m tests.conformance --write"
OUTCOMES = {
    "pruned": "pruned, saved, reloaded and equal to the original with those layers bypassed",
    "refused": "refused with the reason, whatever the layers",
    "no stack": "no repeated layers of its own to remove",
    "not run": "a tiny model was built, but no inputs were found that it runs on; only `verify=False` prunes it",
    "not built": "no tiny model could be built here, so it was not tried",
}


def read() -> dict[str, Any]:
    """The stored list: `versions`, `code` (a hash of it), `types`, `checksum`.

    Raises:
        LayerProbeError: It is not what the run wrote.
    """
    stored = json.loads(files(__package__).joinpath(NAME).read_text(encoding="utf-8"))
    if stored.get("checksum") != _checksum(stored):
        raise LayerProbeError(f"{NAME} has been changed by hand; only `{WRITTEN_BY}` writes it.")
    return stored


def write(types: dict[str, dict[str, Any]], code: str) -> None:
    """Stores what the run found, and by which code."""
    stored: dict[str, Any] = {"written_by": WRITTEN_BY, "versions": versions(), "code": code, "types": types}
    stored["checksum"] = _checksum(stored)
    # A line for each type, so that a change can be read.
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(record)}" for name, record in types.items())
    head = json.dumps({name: value for name, value in stored.items() if name != "types"}, indent=1)[:-2]
    write_atomically(Path(__file__).with_name(NAME), f'{head},\n "types": {{\n{lines}\n}}}}\n')


def versions() -> dict[str, str]:
    """What a list depends on."""
    return {name: version(name).split("+")[0] for name in ("transformers", "torch")}


def support_of(name: str) -> tuple[str, dict[str, Any]]:
    """What became of a model type.

    Args:
        name: The type, such as `"llama"`, or a folder or Hub id whose config names it.

    Returns:
        The type and its record: `class` that was tried, `outcome` (a key of [`OUTCOMES`]), `why` it was not tried, `stacks`
        with what became of each set of removed layers.

    Raises:
        LayerProbeError: The type was not tried, or the config names none.
        OSError: Neither a type, nor a folder, nor a Hub id.
    """
    types = read()["types"]
    model_type = name
    if name not in types:
        from transformers import PreTrainedConfig

        try:
            model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
        except OSError as error:
            close = get_close_matches(name, types, n=3)
            hint = f" Types with names like it: {', '.join(close)}." if close else ""
            raise LayerProbeError(
                f"{name!r} is not one of the {len(types)} model types that were tried, and no folder or Hub id either: "
                f"{error}{hint}"
            ) from error
    if model_type not in types:
        raise LayerProbeError(
            f"Models of type {model_type!r} were not tried: they are not among the {len(types)} types of Transformers "
            f"{read()['versions']['transformers']}. prune_layers checks any model that it is given, also one with code of its "
            "own that you have loaded."
        )
    return model_type, types[model_type]


def table(types: dict[str, dict[str, Any]]) -> str:
    """How many types came out how, as a Markdown table and a sentence."""
    counts = {outcome: sum(record["outcome"] == outcome for record in types.values()) for outcome in OUTCOMES}
    rows = [f"| {outcome} | {counts[outcome]} | {meaning} |" for outcome, meaning in OUTCOMES.items()]
    return "\n".join(["| outcome | types | meaning |", "|---|---:|---|", *rows, "", _summary(types)])


def _summary(types: dict[str, dict[str, Any]]) -> str:
    main = {name: record["stacks"][0] for name, record in types.items() if record["stacks"]}
    pruned = [stack for name, stack in main.items() if types[name]["outcome"] == "pruned"]
    whole = sum(set(stack["sets"].values()) == {"equal"} for stack in pruned)
    return (
        f"Of the {len(main)} types that ran and have a stack, {len(pruned)} ({len(pruned) / max(len(main), 1):.1%}) were pruned: "
        f"{whole} of them without any refusal in the main stack, the others without the sets that they say why they refuse."
    )


def _checksum(stored: dict[str, Any]) -> str:
    content = {name: value for name, value in stored.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
