"""Generated inputs to compare models on: text, images, video, sound and whatever stands beside text, for any model."""

from .search import example_inputs, example_prompt

__all__ = ["example_inputs", "example_prompt"]
