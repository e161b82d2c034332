"""What cannot be pruned, whatever the layers."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from ..errors import PruningError
from ..stacks.adapters import base_of, is_peft_model
from .adapters import check_adapters


def check_prunable(model: Any) -> None:
    """Refuses what cannot be pruned whatever the plan is, before any heavy work.

    Raises:
        PruningError: Not a `PreTrainedModel`, weights not in memory, quantised weights, or adapters that cannot go along.
    """
    if is_peft_model(model):
        check_adapters(model)
        model = base_of(model)
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise PruningError(f"prune_layers expects a transformers PreTrainedModel or a PeftModel, got {name}.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PruningError(
            f"{name} has weights on the meta device (offloaded to disk or CPU by a device_map, or built without weights). "
            "Load it into memory without offloading before pruning."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise PruningError(f"{name} has adapters injected; merge or delete them before pruning.")
    packed = next((n for n, p in model.named_parameters() if not p.is_floating_point()), None)
    quantizer = getattr(model, "hf_quantizer", None)
    # A GGUF file loaded the plain way leaves its quantizer behind on weights that are dense.
    if packed or (quantizer is not None and "gguf" not in type(quantizer).__name__.lower()):
        kind = type(quantizer).__name__ if quantizer is not None else f"{packed} is not floating point"
        raise PruningError(
            f"{name} is quantised ({kind}); prune the unquantised model and quantise the result, or remove the layers from the "
            "quantised model's files (`prune_checkpoint`, `hf-layerprobe prune-files`), where every weight stays as it is."
        )


def check_savable(model: Any) -> None:
    """Refuses a model whose generation config was changed to what Transformers does not write, before any heavy work.

    Raises:
        PruningError: It was, such as by `do_sample=False` beside a temperature.
    """
    model = base_of(model)
    if not model.can_generate():
        return
    with TemporaryDirectory() as folder:
        try:
            model.generation_config.save_pretrained(folder)
        except ValueError as error:
            raise PruningError(
                f"The generation config of this {type(model).__name__} cannot be saved; change model.generation_config. "
                f"Transformers says: {error}"
            ) from error
