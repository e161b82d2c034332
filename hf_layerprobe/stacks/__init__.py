"""Finding a model's repeated layers, and what removing some of them changes in its config."""

from .bypass import bypassed
from .find import LayerStack, find_stacks, resolve_stack

__all__ = ["LayerStack", "bypassed", "find_stacks", "resolve_stack"]
