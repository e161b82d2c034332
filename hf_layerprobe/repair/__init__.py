"""Bringing a pruned model back towards the original; never kept when it measures worse."""

from .run import repair_model
from .settings import ClosedForm, Finetune, Lora, repair_config

__all__ = ["ClosedForm", "Finetune", "Lora", "repair_config", "repair_model"]
