"""`prune-files`: layers removed from a checkpoint's files, without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Keep, Remove, Stack


def prune_files(
    model: Annotated[str, typer.Argument(help="A folder with safetensors, or a Hub id.")],
    output: Annotated[Path, typer.Option(help="A new or empty folder for the pruned model.")],
    plan: Annotated[str | None, typer.Option(help="A plan's file, a pruned model's folder, or its Hub id.")] = None,
    remove: Remove = None,
    keep: Keep = None,
    stack: Stack = None,
    verify: Annotated[
        bool, typer.Option(help="Also run both models, mapped from their files, and compare them.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Remove layers from the files of a model of any size, without loading it.

    Tensors are copied byte by byte under their layers' new numbers; memory does not grow with the model.

    Examples:

    - `hf-layerprobe prune-files ./my-model --remove 20,21 --output smaller`

    - `hf-layerprobe prune-files org/large-model --plan plan.json --output smaller --no-verify`
    """
    from .. import PruningPlan, prune_checkpoint
    from .inputs import layer_list
    from .outputs import ranges, show_json, stacks

    made = PruningPlan.from_pretrained(plan) if plan is not None else None
    prune_checkpoint(
        model, made, remove=layer_list(remove, "--remove"), keep=layer_list(keep, "--keep"), stack=stack, output_dir=output,
        verify=verify,
    )  # fmt: skip
    done = PruningPlan.load(output)
    if as_json:
        about = {"remove": done.remove, "keep": done.keep, "stacks": stacks(done)}
        return show_json({"output": str(output), **about, "verified": verify})
    for part in done.parts:
        typer.echo(f"Removed {ranges(part.remove)} of {part.stack}{'; verified' if verify else ''}")
    typer.echo(f"Model written to {output}")
