"""The table of scores by name. A new score is one file with one `register(...)` line."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

from ..errors import LayerProbeError


@dataclass(frozen=True)
class Score:
    """How a registered score is computed.

    Attributes:
        name: Unique name.
        source: The paper that defines it, or "our own definition".
        higher_is_more_important: Whether a high value argues for keeping the layer.
        needs_data: If false, `make(stack, **options)` returns `(values, details)` at once. If true,
            `make(num_layers, **options)` builds an accumulator of activations for the pass.
        make: See `needs_data`. Scores with the same one and the same options share an accumulator in a pass.
        read: Turns what `make` has built and the pass has filled into `(values, details)`.
        own_runs: Whether activations do not suffice: `make(stack, **options)` then builds an object whose
            `measure(batch)` runs the model by itself on every batch of the pass.
        sites: The activations that it can be measured on (of `hf_layerprobe.activations.SITES`), the default first; with
            several, `make` takes `site=`. Empty for scores that have no such choice.
    """

    name: str
    source: str
    higher_is_more_important: bool
    needs_data: bool
    make: Callable
    read: Callable = methodcaller("compute")
    own_runs: bool = False
    sites: tuple[str, ...] = ()

    @property
    def streams(self) -> bool:
        """Whether it is measured on the activations of any forward pass."""
        return self.needs_data and not self.own_runs

    def source_with(self, options: Mapping[str, Any]) -> str:
        """The source; where a paper's score has options of `make` that are not its own, that this is our variation of it."""
        parameters = inspect.signature(self.make).parameters
        varied = any(value != parameters[name].default for name, value in options.items())
        return f"{OURS}, after {self.source}" if varied and not self.source.startswith(OURS) else self.source

    def check_options(self, options: Mapping[str, Any], *others: str) -> None:
        """Refuses options that `make` does not have.

        Args:
            options: What a caller wants to pass to `make`.
            others: Names that the caller may have meant, which are not options of the score.

        Raises:
            LayerProbeError: The message lists the options and the nearest name.
        """
        parameters = list(inspect.signature(self.make).parameters.values())[1:]
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return
        names = [parameter.name for parameter in parameters]
        for option, value in options.items():
            if option == "site" and value not in self.sites:
                known = (
                    f"can be measured at {', '.join(map(repr, self.sites))}" if self.sites else "has no choice of sites"
                )
                raise LayerProbeError(f"{self.name} {known}, not at {value!r}.{nearest(str(value), self.sites)}")
            if option not in names:
                known = ", ".join(names) or "it has none"
                raise LayerProbeError(
                    f"{self.name} has no option {option!r}.{nearest(option, [*names, *others])} Its options: {known}."
                )


SCORES: dict[str, Score] = {}
OURS = "our own definition"


def register(
    name: str, make: Callable, *, source: str, higher_is_more_important: bool, needs_data: bool, **how: Any
) -> None:
    """Adds a score to the table; `how` are the other attributes of [`Score`]."""
    SCORES[name] = Score(name, source, higher_is_more_important, needs_data, make, **how)


def get_score(name: str) -> Score:
    """Looks a score up.

    Raises:
        LayerProbeError: No such score; the message lists the names and the nearest one.
    """
    if name not in SCORES:
        raise LayerProbeError(
            f"Unknown score {name!r}.{nearest(str(name), SCORES)} Registered: {', '.join(sorted(SCORES))}."
        )
    return SCORES[name]


def nearest(name: str, names: Iterable[str]) -> str:
    """The nearest of the names as a hint, for an error; empty where none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
