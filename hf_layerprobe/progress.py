"""One progress bar for all long work: on the first process only, and silent where Transformers' bars are."""

from __future__ import annotations

import os

from tqdm.auto import tqdm
from transformers.utils.logging import is_progress_bar_enabled


def progress(iterable=None, *, desc: str, total: int | None = None, unit: str = "it") -> tqdm:
    quiet = not is_progress_bar_enabled() or os.environ.get("RANK", "0") != "0"
    return tqdm(iterable, desc=desc, total=total, unit=unit, unit_scale=unit == "FLOP", disable=quiet)
