"""The errors that callers can catch; every other exception is a bug or comes from a library below."""


class LayerProbeError(ValueError):
    """Input that cannot be used: the message says what was found, what was expected and what to do."""


class PruningError(LayerProbeError):
    """A kept set, plan or model that cannot become a plain Transformers model with the same function."""


class VerificationError(PruningError):
    """A pruned model that was measured and is not good enough to be handed on."""


class HubError(LayerProbeError):
    """The Hugging Face Hub cannot be reached, or refuses; no message has a token in it."""
