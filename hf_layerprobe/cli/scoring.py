"""`docs` and `avss`: scores of a model's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DEFAULT_MODEL, MAX_TOKENS, Column, Json, MaxTokens, Model, Stack, TextFile


def docs(
    model: Model = DEFAULT_MODEL,
    kinds: Annotated[
        str | None,
        typer.Option(help="Some of q,k,v,o,gate,up,down. Default: all that the model has."),
    ] = None,
    axis: Annotated[str, typer.Option(help="Compare the rows (`out`) or the columns (`in`) of the matrices.")] = "out",
    figures: Annotated[Path | None, typer.Option(help="Draw a heat map of each kind into this folder.")] = None,
    stack: Stack = None,
    as_json: Json = False,
) -> None:
    """Show how much the weights of layers resemble each other (DOCS, arXiv 2501.16650).

    Reads weights only, no text. Similarity is 1 for equal matrices; compare it with the chance level, that of random
    matrices of the same shapes.

    Examples:

    - `hf-layerprobe docs`

    - `hf-layerprobe docs Qwen/Qwen3-0.6B --kinds q,k --figures maps`
    """
    import numpy as np

    from .. import docs as similarity_of
    from ..report import heat_map
    from .inputs import note_on, open_model
    from .outputs import show_json, show_table

    wanted = [kind.strip() for kind in kinds.split(",")] if kinds else None
    similarity = similarity_of(open_model(model), kinds=wanted, axis=axis, stack=stack)
    files = [str(heat_map(similarity, kind, figures / f"docs_{kind}.png")) for kind in similarity.kinds if figures]
    note = note_on(model)
    if as_json:
        return show_json({"model": model, **similarity.to_dict(), "figures": files, "note": note})
    rows = []
    for kind in similarity.kinds:
        neighbours, chance = np.diagonal(similarity[kind], offset=1), float(np.nanmean(similarity.chance[kind]))
        if np.isnan(neighbours).all():  # hybrids: layers of one kind that stand apart
            rows.append((kind, f"{chance:.3f}", "–", "–", "–"))
            continue
        closest, mean = int(np.nanargmax(neighbours)), similarity.mean_neighbour(kind)
        rows.append((kind, f"{chance:.3f}", f"{mean:.3f}", f"{neighbours[closest]:.3f}", f"{closest}, {closest + 1}"))
    show_table(
        f"DOCS similarity of layers, {similarity.stack} (axis={axis})",
        ("matrix", "chance", "mean of neighbours", "closest neighbours", "layers"),
        rows,
        note,
    )


def avss(
    model: Model = DEFAULT_MODEL,
    variant: Annotated[
        str,
        typer.Option(help="`published` (the paper's formula), `released` (the authors' code) or `relative` (ours)."),
    ] = "relative",
    text: TextFile = None,
    column: Column = "text",
    max_tokens: MaxTokens = MAX_TOKENS,
    stack: Stack = None,
    as_json: Json = False,
) -> None:
    """Score layers by their activations on text: variance over sparsity (AVSS, arXiv 2411.02117).

    Layers with low scores are candidates for removal. The published form almost always names the first layers, and
    removing those ruins a model; `relative` is our own definition, which looks at what a layer adds instead.

    Examples:

    - `hf-layerprobe avss`

    - `hf-layerprobe avss ./my-model --variant published --text corpus.txt`
    """
    import numpy as np

    from .. import avss as scores_of
    from .inputs import note_on, open_model, open_tokenizer, read_texts
    from .outputs import number, show_json, show_table

    texts = read_texts(text, column)
    scores = scores_of(
        open_model(model), texts, variant=variant, tokenizer=open_tokenizer(model), max_tokens=max_tokens, stack=stack
    )
    note = note_on(model)
    if as_json:
        return show_json({"model": model, **scores.to_dict(), "note": note})
    rank = np.argsort(np.argsort(scores.importance, kind="stable")) + 1
    show_table(
        f"{scores.name} ({scores.source}), {scores.stack}, {scores.data['tokens']:,} tokens",
        ("layer", "AVSS", "normalised", "rank (1 goes first)"),
        [
            (str(layer), number(value), number(scores.details["normalised"][layer]), str(rank[layer]))
            for layer, value in enumerate(scores.values)
        ],
        note,
    )
