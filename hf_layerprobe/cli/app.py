"""Puts the commands together. Modules that need torch are imported inside the commands, so that help is fast."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .demo import demo
from .evaluating import evaluate
from .exits import GuardedGroup
from .pruning import plan, prune
from .pruning_files import prune_files
from .pushing import push
from .scoring import avss, docs
from .supports import supports

app = typer.Typer(
    name="hf-layerprobe",
    cls=GuardedGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(docs)
app.command()(avss)
app.command()(plan)
app.command()(prune)
app.command()(prune_files)
app.command()(push)
app.command("eval")(evaluate)
app.command()(supports)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Which layers of a Transformers model resemble each other, which matter, and what is left when the others go.

    Start with `hf-layerprobe demo`. Layers are numbered from 0. MODEL is a folder, a Hugging Face Hub id, or `smollm2`,
    a small English model that comes out of a Python package and needs no download from the Hub.

    Exit codes: 0 done; 1 a pruned model failed its check and was not kept; 2 the request or its input cannot be used.
    """


def main() -> None:
    app()
