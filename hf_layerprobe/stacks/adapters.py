"""What of a model is the base model's, and what PEFT adapters have put around it.

PEFT is slow to import and a model with its adapters has imported it, so nothing here does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


def is_peft_model(model: Any) -> bool:
    """Whether it is a `PeftModel`."""
    return isinstance(model, _class("PeftModel"))


def base_of(model: nn.Module) -> nn.Module:
    """The Transformers model in a `PeftModel`, its adapters still in it and active; any other model as it is."""
    model = getattr(model, "_orig_mod", model)  # what `torch.compile` wraps; `model.compile()` wraps nothing
    return model.get_base_model() if is_peft_model(model) else model


def learns_prompts(model: Any) -> bool:
    """Whether it is a `PeftModel` that puts virtual tokens before the input, outside of the base model."""
    return is_peft_model(model) and model.active_peft_config.is_prompt_learning


def base_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """The modules that there would be without adapters, in module order.

    Yields:
        The name that a module has without adapters, the module, and the adapter's module around it, or None.
    """
    around = None
    if isinstance(module, _class("tuners.tuners_utils.BaseTunerLayer")):
        around, module = module, module.get_base_layer()
    elif isinstance(module, _class("utils.other.AuxiliaryTrainingWrapper")):
        around, module = module, module.original_module
    yield name, module, around
    for child_name, child in module.named_children():
        yield from base_modules(child, f"{name}.{child_name}" if name else child_name)


def _class(path: str) -> type | tuple:
    """A class of PEFT, or what nothing is an instance of where PEFT is not imported."""
    found = sys.modules.get("peft")
    for part in path.split("."):
        found = getattr(found, part, None)
    return found or ()
