"""Computes any registered scores; those that need activations share one pass over the data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, overload

import numpy as np
from torch import nn

from ..activations import batches, run_pass
from ..activations.processes import is_share, own_rows
from ..errors import LayerProbeError
from ..stacks import LayerStack, resolve_stack
from ..stacks.adapters import learns_prompts
from .registry import Score, get_score
from .results import LayerScores

ALIASES = {"avss": "avss-relative"}
PASS_OPTIONS = ("stack", "tokenizer", "batch_size", "max_length", "pack", "max_tokens")


@overload
def score_layers(model: nn.Module, data: Any = None, *, by: str = "avss", **options: Any) -> LayerScores: ...
@overload
def score_layers(
    model: nn.Module, data: Any = None, *, by: Sequence[str], **options: Any
) -> dict[str, LayerScores]: ...
def score_layers(
    model: nn.Module,
    data: Any = None,
    *,
    by: str | Sequence[str] = "avss",
    site: str | None = None,
    stack: str | LayerStack | None = None,
    tokenizer=None,
    batch_size: int = 4,
    max_length: int = 512,
    pack: bool | None = None,
    max_tokens: int | None = None,
    **options: Any,
) -> LayerScores | dict[str, LayerScores]:
    """Scores every layer of a stack by one or several registered scores, with one pass over the data.

    Args:
        model: The model; run in eval mode and left as it was.
        data: A list or a `datasets` data set of texts, conversations, images or audio, with `tokenizer=`, or anything
            that yields model inputs (a list of dicts of tensors, a `DataLoader`, a Trainer's `get_eval_dataloader()`);
            see `hf_layerprobe.activations.batches`. Scores of the weights need none. A loader that `accelerate` has prepared is
            a process's share: every process has to call this then, and gets the scores on the data of all.
        by: A registered name, or several: avss-relative (avss for short), avss-robust, avss-published, avss-released, influence,
            angular, update-norm, cka, stable-rank, lid; taylor, which adds a backward pass on every batch, and bypass,
            which adds a run for each layer; docs, last, random. The data are gone through once.
        site: Which activations are measured, where the scores have a choice: `"layer"`, its output; `"update"`, output −
            input; `"attention"` or `"mlp"`, what that sublayer hands on (before a norm that may follow; the whole block of
            a mixture of experts); or `"mlp-inner"`, what enters the MLP's down projection. Each score's own by default.
        stack: Path of the stack; the main one by default.
        tokenizer: The model's tokenizer for texts and conversations, its processor for images and audio.
        batch_size: Rows a batch, where batches are made here.
        max_length: Tokens a sequence at most, for texts and tokenised rows; no more than the positions that the model
            has.
        pack: Join texts to full-length sequences; by default for decoder-only models. The choice is in the result's
            `data`.
        max_tokens: Of texts and tokenised rows no more tokens than this; else stop after the batch that reaches it.
        options: Options of the score, such as `eps`; only with a single score.

    Returns:
        The scores, or a dict by name when several were asked for.

    Raises:
        LayerProbeError: No or an unknown score or option, missing, empty or unsuitable data, no tokenizer or processor
            for them, `max_tokens` below one sequence that is not cut, a site that a score does not accept or that some
            layers do not have, padding that cannot be told apart in what the layers see, no loss where a score needs one,
            weights not in memory, scores that are not finite, a `PeftModel` with virtual tokens.
    """
    names = [by] if isinstance(by, str) else list(by)
    scores = [get_score(ALIASES.get(name, name)) for name in names]
    if not scores:
        raise LayerProbeError("by= names no score; pass one or several, for example by=['avss', 'influence'].")
    if options and len(scores) != 1:
        raise LayerProbeError(f"Options {sorted(options)} belong to one score; {len(scores)} were asked for.")
    if site is not None:
        options = {**options, "site": site}
    for score in scores:
        score.check_options(options, *PASS_OPTIONS)
    found = resolve_stack(model, stack)
    # Scores that read the same statistics share them.
    streamed = {score.make: score for score in scores if score.needs_data}
    built = {make: make(found if score.own_runs else found.num_layers, **options) for make, score in streamed.items()}
    used: dict[str, Any] = {}
    if built:
        if data is None:
            wanting = [name for name, score in zip(names, scores, strict=True) if score.needs_data]
            raise LayerProbeError(
                f"{', '.join(wanting)}: measured on activations, so data is needed (data=, tokenizer=)."
            )
        refuse_virtual_tokens(model)
        share = is_share(data)
        sizes = dict(batch_size=batch_size, max_length=max_length, pack=pack, max_tokens=max_tokens)
        if share:
            # A process without rows still takes part in adding up: the others wait for it.
            rows = own_rows(data)
            first = next(rows, None)
            rows = [] if first is None else batches(chain([first], rows), model, tokenizer, **sizes)
        else:
            rows = batches(data, model, tokenizer, **sizes)
        watching, running = (
            [built[make] for make, score in streamed.items() if score.own_runs == own] for own in (False, True)
        )
        used = run_pass(found, watching, rows, max_tokens=max_tokens, own_runs=running, share=share)
    results: dict[str, LayerScores] = {}
    for name, score in zip(names, scores, strict=True):
        values, details = score.read(built[score.make]) if score.needs_data else score.make(found, **options)
        about = used | ({"site": site or score.sites[0]} if score.sites else {}) if score.needs_data else {}
        results[name] = _result(score, values, details, found, about, score.source_with(options))
    return results[by] if isinstance(by, str) else results


def refuse_virtual_tokens(model: nn.Module) -> None:
    """Refuses a model whose layers are run here without what stands before their input in use.

    Raises:
        LayerProbeError: A `PeftModel` with virtual tokens (prompt or prefix tuning).
    """
    if learns_prompts(model):
        raise LayerProbeError(
            "This PeftModel puts virtual tokens before the input, outside of the model whose layers are scored, so the layers "
            "would not see what they see in use. Score the layers of `model.get_base_model()`."
        )


def _result(
    score: Score, values: np.ndarray, details: dict, stack: LayerStack, used: dict[str, Any], source: str
) -> LayerScores:
    bad = np.flatnonzero(~np.isfinite(values)).tolist()
    if bad and not score.needs_data:
        raise LayerProbeError(
            f"{score.name} of layers {bad} ({stack.path}) is undefined: it is computed from the weights, and those layers "
            "have nothing that it can compare. Restrict it less (kinds=, for one), or use another score."
        )
    if bad:
        raise LayerProbeError(
            f"{score.name} of layers {bad} ({stack.path}) is not finite: the weights or activations there hold NaN or "
            "infinite values, or no token reached the layer. Check the weights, or run in float32 or bfloat16."
        )
    higher, notes = score.higher_is_more_important, _notes(details)
    return LayerScores(score.name, values, higher, stack.path, source, details, used, notes)


def _notes(details: dict[str, np.ndarray]) -> tuple[str, ...]:
    swamped = np.flatnonzero(details.get("largest_share_at_least", np.empty(0)) >= 0.5).tolist()
    if not swamped:
        return ()
    return (
        f"In layers {swamped} the largest 0.1 % of the values hold at least half of the second moment; the score is about "
        "them. avss(..., robust=True) limits such values.",
    )
