"""Sizes that a config names, wherever in its tree they stand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

# Words in the name of the config node that describes a modality's tower.
TOWERS = {"image": ("vision", "visual", "image"), "audio": ("audio", "speech", "encoder"), "text": ("text",)}


class Sizes:
    """Looks fields up in a config and the configs inside it, those of one modality's tower first.

    Args:
        config: The model's config.
        modality: A key of `TOWERS`.
    """

    def __init__(self, config: PreTrainedConfig, modality: str):
        nodes = list(_nodes(config))
        own = [node for path, node in nodes if any(word in name for name in path for word in TOWERS[modality])]
        self.nodes = own + [node for _, node in nodes if all(node is not other for other in own)]

    def get(self, *names: str, default: Any = None, kinds: tuple[type, ...] = (int,)) -> Any:
        """The first field of that name and kind; earlier names before later ones in each node."""
        for node in self.nodes:
            for name in names:
                try:
                    value = getattr(node, name, None)
                except Exception:  # fields that differ between layers refuse to be read as one
                    continue
                if isinstance(value, kinds) and not isinstance(value, bool):
                    return value
        return default

    def side(self, *names: str, default: int) -> int:
        """A size that may be given for each axis; the last of them."""
        value = self.get(*names, kinds=(int, list, tuple), default=default)
        return value if isinstance(value, int) else int(value[-1])


def special_tokens(config: PreTrainedConfig) -> set[int]:
    """Ids with a meaning of their own, such as those that stand for an image."""
    found = set()
    for _, node in _nodes(config):
        for name, value in vars(node).items():
            if name.endswith(("token_id", "token_index", "token_ids")):
                found.update(
                    each for each in (value if isinstance(value, (list, tuple)) else [value]) if type(each) is int
                )
    return found


def _nodes(config: PreTrainedConfig) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    """Breadth first, with the attribute names that lead there."""
    queue: list[tuple[tuple[str, ...], PreTrainedConfig]] = [((), config)]
    for path, node in queue:
        yield path, node
        queue += [((*path, name), value) for name, value in vars(node).items() if isinstance(value, PreTrainedConfig)]
