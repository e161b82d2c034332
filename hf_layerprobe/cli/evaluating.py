"""`eval`: perplexity and bits per byte of a model, alone or beside the one it came from."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import DEFAULT_MODEL, MAX_TOKENS, Column, Json, MaxTokens, Model, TextFile


def evaluate(
    model: Model = DEFAULT_MODEL,
    baseline: Annotated[
        str | None, typer.Option(help="The model before pruning: a folder, Hub id or `smollm2`.")
    ] = None,
    text: TextFile = None,
    column: Column = "text",
    max_tokens: MaxTokens = MAX_TOKENS,
    card: Annotated[
        str | None,
        typer.Option(help="Write the results into the model card of MODEL, a folder, as results on data of this name."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how well a causal language model predicts text: lower perplexity and bits per byte are better.

    Both models read the text through the tokenizer of the baseline, if there is one.

    Examples:

    - `hf-layerprobe eval`

    - `hf-layerprobe eval ./smaller --baseline smollm2 --text held-out.txt --card "my corpus"`
    """
    from pathlib import Path

    from .. import PruningPlan, evaluate_model, model_card
    from ..evaluation.overlap import warn_if_seen
    from ..hub import PLAN_FILE
    from .inputs import first_tokens, note_on, open_model, open_tokenizer, read_texts
    from .outputs import number, show_json, show_table

    if card is not None:
        model_card(model)  # fails now, if there is no pruned model in that folder
    texts = read_texts(text, column)
    measured, before = open_model(model), open_model(baseline) if baseline else None
    tokenizer = open_tokenizer(baseline or model)
    if Path(model, PLAN_FILE).is_file():
        warn_if_seen(texts, PruningPlan.load(model), measured, tokenizer)
    texts = first_tokens(texts, tokenizer, max_tokens)
    comparison = evaluate_model(measured, texts, tokenizer=tokenizer, baseline=before)
    note = note_on(model, baseline)
    if card is not None:
        model_card(model, results={card: comparison}).save(Path(model, "README.md"))
    if as_json:
        return show_json({"model": model, "baseline": baseline, **comparison.to_dict(), "note": note})
    rows = [
        (name, number(found.perplexity), f"{found.bits_per_byte:.3f}", f"{found.loss:.3f}", f"{found.parameters:,}")
        for name, found in ((baseline, comparison.before), (model, comparison.after))
        if found is not None
    ]
    title = f"Predicting {comparison.after.tokens:,} tokens"
    if comparison.before:
        title += f": perplexity × {number(comparison.perplexity_ratio)}"
    show_table(title, ("model", "perplexity", "bits per byte", "loss (nats)", "parameters"), rows, note)
