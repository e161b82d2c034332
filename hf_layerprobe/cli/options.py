"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A folder, a Hub id, or `smollm2` (comes out of a Python package).")]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="Texts: a .txt file (paragraphs between blank lines) or a .jsonl file. Default: English Wikipedia passages.",
    ),
]
Column = Annotated[str, typer.Option(help="The field of a .jsonl file that holds the text.")]
MaxTokens = Annotated[int, typer.Option(min=2, help="Tokens to read at most.")]
Stack = Annotated[
    str | None,
    typer.Option(help="Which list of layers, such as `model.layers`. Default: the main one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
By = Annotated[
    str,
    typer.Option(
        help="The rule that chooses: `auto` measures several and takes the best; or one of avss-relative, "
        "avss-published, avss-released, influence, angular, update-norm, cka, stable-rank, lid, taylor, bypass, docs, last, random; or combined, contiguous, greedy, beam."
    ),
]
Ratio = Annotated[float | None, typer.Option(help="Share of the layers to remove, such as 0.25.")]
NumLayers = Annotated[int | None, typer.Option(help="Number of layers to remove.")]
Remove = Annotated[str | None, typer.Option(help="The layers to remove, such as `3,5`; -1 is the last.")]
Keep = Annotated[str | None, typer.Option(help="The layers to keep, such as `0,1,2,11`.")]
MAX_TOKENS = 8192
DEFAULT_MODEL = "smollm2"
