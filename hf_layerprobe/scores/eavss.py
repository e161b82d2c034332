"""EAVSS: which layers react differently to hallucinated than to factual answers (after arXiv 2411.10069)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..activations import LayerStream
from ..activations.checks import Vocabulary
from ..activations.data import check_positive, longest
from ..activations.fingerprint import Fingerprint
from ..activations.forward import one_logit
from ..activations.text import token_ids
from ..errors import LayerProbeError
from ..modes import evaluating
from ..precision import widest
from ..progress import progress
from ..stacks import LayerStack, resolve_stack
from .avss import check_eps
from .registry import OURS
from .results import LayerScores
from .run import refuse_virtual_tokens

SOURCE = f"{OURS}, after EAVSS, arXiv 2411.10069"
COLUMNS = ("prompt", "factual", "hallucinated")


class SequenceMoments:
    """Count, sum, sum of squares and number of small values of the layers' relative updates, sequence by sequence.

    Kept apart for each sequence, so that pairs can be resampled; `tokens` says which tokens of the next batch count.
    """

    def __init__(self, num_layers: int, eps: float):
        self.eps = eps
        self.tokens: torch.Tensor | None = None  # [batch, tokens]
        self.layers: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> None:
        wide = widest(before.device)
        before, after = before.to(wide), after.to(wide)
        rms = before.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        update = (after - before) / rms
        weight = self.tokens.to(update.device, wide)  # [batch, tokens]
        sums = [torch.full_like(update[..., 0], update.shape[-1]), update.sum(-1), update.square().sum(-1)]
        sums.append((update.abs() < self.eps).sum(-1).to(wide))
        moments = torch.stack([(part * weight).sum(1) for part in sums], -1)  # [batch, 4]
        self.layers[layer].append(moments)

    def moments(self) -> np.ndarray:
        """`[sequences, layers, 4]`."""
        return np.stack([torch.cat(parts).cpu().double().numpy() for parts in self.layers], axis=1)


def eavss(
    model: PreTrainedModel,
    pairs: Iterable[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Sequence[str] = COLUMNS,
    eps: float = 0.05,
    stack: str | LayerStack | None = None,
    batch_size: int = 8,
    max_length: int = 512,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LayerScores:
    """How differently each layer treats hallucinated and factual answers to the same prompts (our own definition).

    After the enhanced AVSS of arXiv 2411.10069, whose formulas were not readable. On the layer's update in units of the
    stream, over the answer's tokens only: HSAV_i = |σ²_i(hallucinated) − σ²_i(factual)| and HSS_i = |s_i(hallucinated) −
    s_i(factual)| with s the share of values below `eps`, each divided by its sum over layers; EAVSS_i = HSAV_i / HSS_i.
    The difference of two noisy variances is often noise, so it comes with a paired bootstrap interval.

    Args:
        model: A decoder-only language model; run in eval mode and left as it was.
        pairs: Rows with a prompt and two answers to it, such as a `datasets.Dataset` or `IterableDataset`. Answers are
            appended to the prompt as they are; give them their leading space, or the prompt its last line.
        tokenizer: The model's tokenizer.
        columns: Where the rows hold the prompt, the factual and the hallucinated answer.
        eps: Threshold of inactivity, in units of the stream.
        stack: Path of the stack; the main one by default.
        batch_size: Sequences a batch.
        max_length: Tokens a sequence, no more than the positions that the model has; longer prompts lose their
            beginning, and longer answers are refused.
        resamples: Bootstrap resamples of the pairs.
        confidence: Coverage of the interval.
        seed: Of the bootstrap.

    Returns:
        Scores, higher reacts more; `details` has `hsav`, `hss`, the signed `variance_difference` (hallucinated − factual)
        with `low` and `high`, and `covers_zero`, 1 for each layer whose interval covers zero. `data` has a fingerprint.

    Raises:
        LayerProbeError: Fewer than two pairs, columns that are missing or not three, an answer that is empty or longer than
            `max_length`, a size or `eps` that is not positive, a confidence outside (0, 1), a `PeftModel` with virtual
            tokens, or values that are not finite.
    """
    check_positive(batch_size=batch_size, max_length=max_length, resamples=resamples)
    check_eps(eps)
    if not 0 < confidence < 1:
        raise LayerProbeError(f"confidence is the coverage of the interval, between 0 and 1; got {confidence}.")
    refuse_virtual_tokens(model)
    max_length = longest(model, max_length)
    found = resolve_stack(model, stack)
    rows = _rows(pairs, columns)
    prompt, *answers = columns
    sequences = [_answer_tokens(row[prompt], row[answer], tokenizer, max_length) for answer in answers for row in rows]
    moments, used = _measure(found, sequences, eps, batch_size, getattr(tokenizer, "pad_token_id", None) or 0)
    factual, hallucinated = moments[: len(rows)], moments[len(rows) :]  # [pairs, layers, 4]
    variance, sparsity = _differences(factual.sum(0), hallucinated.sum(0))
    draws = np.random.default_rng(seed).integers(0, len(rows), (resamples, len(rows)))
    resampled = [_differences(factual[draw].sum(0), hallucinated[draw].sum(0))[0] for draw in draws]
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    smallest = 1 / moments[..., 0].sum(0)  # the smallest difference in shares that this many values can show
    hsav, hss = np.abs(variance), np.maximum(np.abs(sparsity), smallest)
    values = (hsav / max(hsav.sum(), np.finfo(float).tiny)) / (hss / hss.sum())
    if not np.isfinite(values).all():
        raise LayerProbeError("eavss is not finite: the model's activations hold NaN or infinite values.")
    details = {
        "hsav": hsav,
        "hss": hss,
        "variance_difference": variance,
        "low": low,
        "high": high,
        "covers_zero": ((low <= 0) & (high >= 0)).astype(float),
    }
    used = {"pairs": len(rows), **used, "eps": eps, "confidence": confidence}
    return LayerScores("eavss", values, False, found.path, SOURCE, details, used)


def _rows(pairs: Iterable[Mapping[str, str]], columns: Sequence[str]) -> list[Mapping[str, str]]:
    if isinstance(columns, str) or len(columns) != len(COLUMNS):
        raise LayerProbeError(
            f"columns names three, those of the prompt, the factual and the hallucinated answer; got {columns!r}."
        )
    rows = list(pairs)
    if len(rows) < 2:
        raise LayerProbeError(f"eavss needs at least two pairs to compare, got {len(rows)}.")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise LayerProbeError(f"Pair {index} is a {type(row).__name__}; expected a row with {list(columns)}.")
        missing = [name for name in columns if not isinstance(row.get(name), str)]
        if missing:
            raise LayerProbeError(
                f"Pair {index} has no text under {missing}; its columns are {list(row)}. Name those of the prompt, the "
                "factual and the hallucinated answer by columns=."
            )
    return rows


def _answer_tokens(prompt: str, answer: str, tokenizer, max_length: int) -> tuple[list[int], int]:
    """Token ids of prompt and answer, and how many at the end are the answer."""
    before = token_ids(tokenizer, prompt) if prompt else []
    ids = token_ids(tokenizer, answer, add_special_tokens=False)
    if not ids:
        raise LayerProbeError(f"An answer to {prompt[:60]!r} has no tokens.")
    if len(ids) > max_length:
        raise LayerProbeError(
            f"The answer {answer[:60]!r} to {prompt[:60]!r} has {len(ids)} tokens, and a sequence at most {max_length}. Raise "
            "max_length=, as far as the model has positions, or leave the pair out."
        )
    room = max_length - len(ids)
    return (before[-room:] if room else []) + ids, len(ids)


def _measure(
    stack: LayerStack, sequences: list, eps: float, batch_size: int, pad: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """`[sequences, layers, 4]` moments of the answers, and what they were measured on."""
    model = stack.model
    if any(parameter.is_meta for parameter in model.parameters()):
        raise LayerProbeError(f"{type(model).__name__} has weights on the meta device; load it into memory first.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise LayerProbeError(
            f"eavss reads prompt and answer as one text, and {type(model).__name__} is an encoder-decoder model; pass a decoder."
        )
    vocabulary = Vocabulary(model)
    moments, fingerprint = SequenceMoments(stack.num_layers, eps), Fingerprint(model)
    # Sequences of like length share a batch, so that little of it is padding.
    order = np.argsort([len(ids) for ids, _ in sequences], kind="stable")
    with evaluating(model), LayerStream(stack, [moments]), torch.no_grad():
        for start in progress(range(0, len(order), batch_size), desc="EAVSS", unit="batch"):
            group = [sequences[i] for i in order[start : start + batch_size]]
            length = max(len(ids) for ids, _ in group)
            ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in group])
            lengths = torch.tensor([len(ids) for ids, _ in group])[:, None]
            answers = torch.tensor([answer for _, answer in group])[:, None]
            position = torch.arange(length)[None]
            moments.tokens = (position < lengths) & (position >= lengths - answers)
            batch = {"input_ids": ids, "attention_mask": (position < lengths).long()}
            vocabulary.check(batch, start // batch_size)
            fingerprint.update(batch)
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            model(**inputs, use_cache=False, **one_logit(model, inputs))
    used = {"tokens": sum(answer for _, answer in sequences), "fingerprint": fingerprint.hexdigest()}
    return moments.moments()[np.argsort(order)], used


def _differences(factual: np.ndarray, hallucinated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Differences of variance and sparsity, hallucinated − factual, from `[layers, 4]` sums."""
    variance, sparsity = zip(
        *((m[:, 2] / m[:, 0] - (m[:, 1] / m[:, 0]) ** 2, m[:, 3] / m[:, 0]) for m in (factual, hallucinated)),
        strict=True,
    )
    return variance[1] - variance[0], sparsity[1] - sparsity[0]
