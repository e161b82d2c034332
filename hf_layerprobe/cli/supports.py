"""`supports`: what the list of tried model types says."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Json


def supports(
    model: Annotated[str, typer.Argument(help="A model type such as `llama`, a folder, or a Hub id.")],
    as_json: Json = False,
) -> None:
    """Say whether models of a type can be pruned, as tried on tiny random models of every type.

    Examples:

    - `hf-layerprobe supports qwen3`

    - `hf-layerprobe supports ./my-model`
    """
    from ..supported import OUTCOMES, read, support_of
    from .outputs import show_json, show_table

    model_type, record = support_of(model)
    versions = read()["versions"]
    if as_json:
        return show_json({"type": model_type, **record, "versions": versions})
    tried = f"{record['class']} of Transformers {versions['transformers']}" if record["class"] else "no class"
    typer.echo(f"{model_type}: {record['outcome']} ({OUTCOMES[record['outcome']]}). Tried: {tried}.")
    if record.get("why"):
        typer.echo(record["why"])
    if record["stacks"]:
        show_table(
            "Removed layers, counted from 0",
            ("layers removed", "of", "in", "outcome"),
            [
                (removed, str(stack["layers"]), stack["path"], outcome)
                for stack in record["stacks"]
                for removed, outcome in stack["sets"].items()
            ],
        )
