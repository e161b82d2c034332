"""The errors that callers can catch; every other exception is a bug or comes from a library below."""

from collections.abc import Iterable, Sequence


class LayerProbeError(ValueError):
    """Input that cannot be used: the message says what was found, what was expected and what to do."""


class PruningError(LayerProbeError):
    """A kept set, plan or model that cannot become a plain Transformers model with the same function.

    Attributes:
        nearest: Kept sets (0-based) of the same stack that can, those most like the refused one first; empty where none
            was found or none was looked for.
    """

    def __init__(self, message: str = "", nearest: Iterable[Sequence[int]] = ()):
        super().__init__(message)
        self.nearest = tuple(tuple(keep) for keep in nearest)


class VerificationError(PruningError):
    """A pruned model that was measured and is not good enough to be handed on."""


class HubError(LayerProbeError):
    """The Hugging Face Hub cannot be reached, or refuses; no message has a token in it."""
