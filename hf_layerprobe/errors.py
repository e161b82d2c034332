"""The errors that callers can catch; every other exception is a bug or comes from a library below."""


class LayerProbeError(ValueError):
    """Input that cannot be used: the message says what was found, what was expected and what to do."""


class PruningError(LayerProbeError):
    """A kept set, plan or model that cannot become a plain Transformers model with the same function."""
