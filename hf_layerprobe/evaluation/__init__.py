"""What a model is worth: perplexity and bits per byte, before and after."""

from .comparison import Comparison, Evaluation, evaluate_model

__all__ = ["Comparison", "Evaluation", "evaluate_model"]
