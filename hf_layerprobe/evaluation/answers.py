"""What comes out of a task: a score with its interval, and two models side by side."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .intervals import Interval, interval, resampled_ratio, share_interval


@dataclass(frozen=True)
class TaskResult:
    """What one model scores in a task.

    Attributes:
        task: The task.
        metric: What is measured, such as `"acc"`.
        value: Its value over all items.
        items: Number of items.
        interval: 95 % interval, Wilson's for a share of right answers, else bootstrapped over the items; None where the
            items' own scores are not known.
        chance: What guessing scores, if that is known.
        higher_is_better: False for losses, error rates and perplexities.
        samples: The value in each bootstrap sample of the items, the same draws for every model.
        data: SHA-256 of the items, where they are known.
    """

    task: str
    metric: str
    value: float
    items: int
    interval: Interval | None = None
    chance: float | None = None
    higher_is_better: bool = True
    samples: np.ndarray | None = field(default=None, repr=False, compare=False)
    data: str = field(default="", repr=False, compare=False)

    @classmethod
    def mean(cls, task: str, metric: str, per_item: np.ndarray, **known: Any) -> TaskResult:
        """The result whose value is the mean of the items' scores.

        Args:
            task: The task.
            metric: What is measured.
            per_item: The score of each item, `[items]`.
            known: `chance`, `higher_is_better` and `data`.
        """
        samples, items = resampled_ratio(per_item), len(per_item)
        is_share = bool(np.isin(per_item, (0, 1)).all())
        ends = share_interval(int(per_item.sum()), items) if is_share else interval(samples)
        return cls(task, metric, float(per_item.mean()), items, ends, samples=samples, **known)

    def to_dict(self) -> dict[str, Any]:
        """All but the bootstrap samples and what tells data apart."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.compare}


@dataclass(frozen=True)
class TaskComparison:
    """A model's score in a task, and that of the model it came from when there is one, on the same items.

    Attributes:
        after: The evaluated model.
        before: The baseline.
    """

    after: TaskResult
    before: TaskResult | None = None

    @property
    def value(self) -> float:
        return self.after.value

    @property
    def retained(self) -> float | None:
        """After divided by before, or before by after where lower is better: 1 when nothing was lost.

        A model that guesses keeps a good part of a weak one's accuracy: see `retained_above_chance`.
        """
        return self._share(0.0)

    @property
    def retained_interval(self) -> Interval | None:
        """95 % interval of `retained`, paired: both models answered the same items."""
        return self._share_interval(0.0)

    @property
    def retained_above_chance(self) -> float | None:
        """(after − chance) / (before − chance): 0 for a model that guesses; None if the baseline is not above chance."""
        return self._share(self.before.chance) if self.before else None

    @property
    def retained_above_chance_interval(self) -> Interval | None:
        """95 % interval of `retained_above_chance`, paired; NaN where a resampled baseline is not above chance."""
        return self._share_interval(self.before.chance) if self.before else None

    def to_dict(self) -> dict[str, Any]:
        names = ("retained", "retained_interval", "retained_above_chance", "retained_above_chance_interval")
        return {
            "after": self.after.to_dict(),
            "before": self.before.to_dict() if self.before else None,
            **{name: getattr(self, name) for name in names},
        }

    def _share(self, floor: float | None) -> float | None:
        if self.before is None or floor is None:
            return None
        part, whole = self.after.value - floor, self.before.value - floor
        if not self.after.higher_is_better:
            part, whole = whole, part
        return part / whole if whole > 0 else None

    def _share_interval(self, floor: float | None) -> Interval | None:
        if self._share(floor) is None or self.after.samples is None or self.before.samples is None:
            return None
        part, whole = self.after.samples - floor, self.before.samples - floor
        if not self.after.higher_is_better:
            part, whole = whole, part
        return interval(np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0))
