"""Deciding which layers go: by a score, or by measuring what sets of them cost."""

from .choose import Choice, choose
from .curve import Curve
from .losses import SetLosses

__all__ = ["Choice", "Curve", "SetLosses", "choose"]
