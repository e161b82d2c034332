"""Bringing a pruned model back towards the original; never kept when it measures worse."""

from .run import ClosedForm, repair_config, repair_model

__all__ = ["ClosedForm", "repair_config", "repair_model"]
