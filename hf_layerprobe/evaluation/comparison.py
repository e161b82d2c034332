"""`evaluate_model`: perplexity and bits per byte on text, of one model or of two side by side."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..activations.data import check_positive, longest, text_rows
from ..activations.text import token_ids
from ..errors import LayerProbeError
from ..plan import PruningPlan, opened_plan
from ..scores.loss import check_causal
from .intervals import Interval, interval, resampled_ratio
from .likelihood import Request, first_token, losses
from .models import to_measure
from .overlap import warn_if_seen


@dataclass(frozen=True)
class Evaluation:
    """How well one model predicts a text.

    Attributes:
        loss: Mean loss of a token, nats.
        perplexity: e to the power of the loss.
        bits_per_byte: Loss in bits for each UTF-8 byte of text; comparable between tokenizers.
        tokens: Tokens predicted.
        bytes: UTF-8 bytes of the text.
        parameters: Parameters of the model, tied ones once.
        text_losses: Summed loss of each text that is not empty, nats, `[texts]`.
        text_bytes: UTF-8 bytes of each of them, `[texts]`.
        data: SHA-256 of the tokens and the windows that they were read in.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    parameters: int
    text_losses: np.ndarray = field(repr=False, compare=False)
    text_bytes: np.ndarray = field(repr=False, compare=False)
    data: str = field(default="", repr=False, compare=False)

    @property
    def bits_per_byte_interval(self) -> Interval:
        """95 % interval of the bits per byte, bootstrapped over the texts."""
        return interval(resampled_ratio(self.text_losses / math.log(2), self.text_bytes))

    def to_dict(self) -> dict[str, Any]:
        """The totals, and the interval; not what each text gave."""
        totals = {each.name: getattr(self, each.name) for each in fields(self) if each.compare}
        return {**totals, "bits_per_byte_interval": self.bits_per_byte_interval}


@dataclass(frozen=True)
class Comparison:
    """An evaluation, and that of the model it came from when there is one.

    Attributes:
        after: The evaluated model.
        before: The baseline, on the same text.
    """

    after: Evaluation
    before: Evaluation | None = None

    @property
    def loss(self) -> float:
        return self.after.loss

    @property
    def perplexity(self) -> float:
        return self.after.perplexity

    @property
    def bits_per_byte(self) -> float:
        return self.after.bits_per_byte

    @property
    def perplexity_ratio(self) -> float | None:
        """Perplexity after divided by before."""
        return self.after.perplexity / self.before.perplexity if self.before else None

    @property
    def retained(self) -> float | None:
        """Loss before divided by after, which is also that of the bits per byte: 1 when nothing was lost."""
        return self.before.loss / self.after.loss if self.before else None

    @property
    def retained_interval(self) -> Interval | None:
        """95 % interval of `retained`, bootstrapped over the texts, which both models read."""
        return interval(resampled_ratio(self.before.text_losses, self.after.text_losses)) if self.before else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "after": self.after.to_dict(),
            "before": self.before.to_dict() if self.before else None,
            "perplexity_ratio": self.perplexity_ratio,
            "retained": self.retained,
            "retained_interval": self.retained_interval,
        }


def evaluate_model(
    model: PreTrainedModel,
    data: Sequence[str] | Dataset,
    *,
    tokenizer: PreTrainedTokenizerBase,
    baseline: PreTrainedModel | Evaluation | None = None,
    plan: PruningPlan | str | Path | None = None,
    max_length: int = 512,
    batch_size: int = 4,
) -> Comparison:
    """Measures perplexity and bits per byte of a causal language model on text, before and after.

    Every token of every text is predicted exactly once: a text starts after the tokenizer's BOS (or EOS) token, and one
    that is longer than `max_length` goes on in a next window that starts with the last token of the one before (the
    rolling likelihood of lm-evaluation-harness).

    Args:
        model: A causal language model; left in the mode it was in.
        data: Texts, or a `datasets.Dataset` with a text column.
        tokenizer: The tokenizer of the model, and of the baseline.
        baseline: The model before pruning, or its evaluation on the same data (`Comparison.after`).
        plan: The plan that the model was pruned by, or the file, folder or Hub id of one: warns if its calibration, held-out
            or repair data are these texts.
        max_length: Tokens a window; no more than the positions that the model has (by its config).
        batch_size: Windows a batch.

    Returns:
        The evaluation of the model as `.after`, of the baseline as `.before`.

    Raises:
        LayerProbeError: No text, no tokenizer, a size that is not positive, a baseline's evaluation on other text or windows, a
            model that is not loaded or does not predict the next token, or no plan where one is named.
    """
    if tokenizer is None:
        raise LayerProbeError("evaluate_model measures on text, so it needs tokenizer=.")
    check_positive(max_length=max_length, batch_size=batch_size)
    models = to_measure(model, baseline, Evaluation)
    max_length = min(longest(each, max_length) for each in models)
    texts = [text for text in text_rows(data) if text]
    windows = [(owner, window) for owner, text in enumerate(texts) for window in _windows(text, tokenizer, max_length)]
    if not windows:
        raise LayerProbeError("The data has no text to evaluate on: it is empty, or every text is.")
    for each in models:
        check_causal(each)
    if plan is not None:
        warn_if_seen(texts, opened_plan(plan), model, tokenizer)
    before = None
    about = hashlib.sha256(json.dumps(windows).encode()).hexdigest()
    if isinstance(baseline, Evaluation):
        before = baseline
        if baseline.data != about:
            raise LayerProbeError(
                f"The baseline was evaluated on other text or in other windows ({len(baseline.text_bytes)} texts of "
                f"{baseline.bytes:,} bytes and {baseline.tokens:,} tokens; here {len(texts)} of "
                f"{sum(len(text.encode()) for text in texts):,} and {sum(len(wanted) for _, (_, wanted) in windows):,}, at most "
                f"{max_length} a window); evaluate it on the same."
            )
    elif baseline is not None:
        before = _evaluate(baseline, texts, windows, batch_size, about)
    return Comparison(after=_evaluate(model, texts, windows, batch_size, about), before=before)


def _windows(text: str, tokenizer, max_length: int) -> Iterator[Request]:
    ids = token_ids(tokenizer, text, add_special_tokens=False)
    read = [first_token(tokenizer), *ids[:-1]]
    for begin in range(0, len(ids), max_length):
        yield read[begin : begin + max_length], ids[begin : begin + max_length]


def _evaluate(
    model: PreTrainedModel, texts: list[str], windows: list[tuple[int, Request]], batch_size: int, about: str
) -> Evaluation:
    found = losses(model, [window for _, window in windows], batch_size=batch_size, desc="Perplexity")
    by_text = np.bincount([owner for owner, _ in windows], weights=found, minlength=len(texts))
    sizes = np.array([len(text.encode()) for text in texts])
    tokens = sum(len(wanted) for _, (_, wanted) in windows)
    loss = by_text.sum() / tokens
    return Evaluation(
        loss=float(loss),
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=float(by_text.sum() / math.log(2) / sizes.sum()),
        tokens=tokens,
        bytes=int(sizes.sum()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        text_losses=by_text,
        text_bytes=sizes,
        data=about,
    )
