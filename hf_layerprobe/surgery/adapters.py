"""PEFT adapters on a pruned model: those of the kept layers go along, under their new numbers.

The base model is pruned like any other. Then the same adapters are made on it, from configs in which everything that named
layers names the kept ones, and get the originals' tensors; what does not fit exactly is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ..errors import PruningError
from ..stacks import LayerStack
from ..stacks.adapters import base_modules, base_of
from ..stacks.bind import build_on_meta

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

FOLDER = "adapters"
# Methods whose tensors have a slot for each layer, or that stand between layers instead of around their modules.
PER_LAYER = {
    "PREFIX_TUNING": "its prefix holds keys and values of every layer in one tensor",
    "CARTRIDGE": "its cache holds keys and values of every layer in one tensor",
    "ADAPTION_PROMPT": "its prompts belong to the topmost layers, by their number",
    "XLORA": "its router mixes adapters over all layers",
}


def check_adapters(model: PeftModel) -> None:
    """Refuses adapters that cannot go along, whatever the plan is.

    Raises:
        PruningError: A method that is per layer in a way that cannot be cut, copied layers, merged adapters, or an adapter
            for another base model.
    """
    base = base_of(model).config.name_or_path
    for name, config in model.peft_config.items():
        method = config.peft_type.value
        if method in PER_LAYER:
            raise PruningError(
                f"The adapter {name!r} ({method}) cannot go along to a pruned model: {PER_LAYER[method]}. Prune the base model "
                "(`model.get_base_model()`) and train the adapter again."
            )
        if getattr(config, "layer_replication", None) or (method == "ADALORA" and config.rank_pattern):
            what = "copies layers" if method != "ADALORA" else "has its ranks for each layer's tensors in its config"
            raise PruningError(f"The adapter {name!r} {what}; merge it first: `model.merge_and_unload()`.")
        trained_on = config.base_model_name_or_path
        if trained_on and base and Path(trained_on).name != Path(base).name:
            raise PruningError(
                f"The adapter {name!r} is for another base model: its config names {trained_on!r}, and it is on {base!r}. If they "
                f"are the same weights, say so: model.peft_config[{name!r}].base_model_name_or_path = {base!r}."
            )
    merged = sorted({each for module in model.modules() for each in getattr(module, "merged_adapters", ())})
    if merged:
        raise PruningError(
            f"The adapters {merged} are merged into the weights. Take them out with `model.unmerge_adapter()`, or make them part "
            "of the model with `model.merge_and_unload()`, and prune then."
        )


def without_adapters(model: PeftModel) -> PreTrainedModel:
    """The base model as if no adapter were in it: a new model that shares its tensors; the given one stays as it is."""
    base = base_of(model)
    plain = build_on_meta(base, base.config)
    modules = {name: module for name, module, _ in base_modules(base)}
    parameters: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for name, module in plain.named_modules(remove_duplicate=False):
        source = modules[name]
        module.training = source.training
        for key, old in source._parameters.items():
            if old is not None:
                new = parameters.setdefault(id(old), nn.Parameter(old.data, requires_grad=old.requires_grad))
                module.register_parameter(key, new)
        module._buffers.update(source._buffers)
        for key, value in vars(module).items():  # tensors kept as plain attributes
            if isinstance(value, torch.Tensor) and value.is_meta:
                setattr(module, key, getattr(source, key))
    if base.can_generate():
        plain.generation_config = copy.deepcopy(base.generation_config)
    return plain


def with_adapters(model: PeftModel, pruned: PreTrainedModel, kept: Mapping[LayerStack, Sequence[int]]) -> PeftModel:
    """The pruned base model with the adapters of the kept layers, whose tensors are shared with the original's.

    Args:
        model: The original with its adapters; left as it was.
        pruned: The pruned base model, without adapters; they are put into it.
        kept: The layers kept, 0-based, ascending, for each stack of the original that lost some.

    Raises:
        PruningError: An adapter that is on removed layers only, or whose tensors do not fit exactly.
    """
    from peft import get_peft_model

    names = Renaming({each.path: tuple(keep) for stack, keep in kept.items() for each in (stack, *stack.siblings)})
    made = None
    for adapter, config in model.peft_config.items():
        if config.is_prompt_learning:
            config = copy.deepcopy(config)
            config.num_layers = None  # PEFT reads it from the model
        else:
            config = _renumbered(model, adapter, names, pruned)
        if made is None:
            made = get_peft_model(pruned, config, adapter_name=adapter)
        else:
            made.add_adapter(adapter, config)
    if not model.active_peft_config.is_prompt_learning:
        made.base_model.set_adapter(model.active_adapters)
    _share(model, made, names)
    return made


@dataclass(frozen=True)
class Renaming:
    """Names of modules and tensors, here and in the pruned model, by the layers kept of each list."""

    kept: dict[str, tuple[int, ...]]

    def new(self, name: str) -> str | None:
        """None for what belongs to a removed layer."""
        return self._renamed(name, lambda keep, old: keep.index(old) if old in keep else None)

    def old(self, name: str) -> str:
        return self._renamed(name, lambda keep, new: keep[new])

    def _renamed(self, name: str, index: Callable[[tuple[int, ...], int], int | None]) -> str | None:
        for path, keep in self.kept.items():
            # A PeftModel puts `base_model.model.` before the names of its base model.
            if match := re.match(rf"((?:base_model\.(?:model\.)?)?{re.escape(path)}\.)(\d+)(?=\.|$)", name):
                number = index(keep, int(match[2]))
                return None if number is None else f"{match[1]}{number}{name[match.end() :]}"
        return name


def _share(model: PeftModel, made: PeftModel, names: Renaming) -> None:
    """Gives the new adapters the tensors of the old ones, and every module and parameter its mode."""
    old, new = _adapter_tensors(model), _adapter_tensors(made)
    wanted = {name: new_name for name in old if (new_name := names.new(name)) is not None}
    shapes = {name: tuple(getattr(module, key).shape) for name, (module, key) in new.items()}
    expected = {new_name: tuple(getattr(*old[name]).shape) for name, new_name in wanted.items()}
    if shapes != expected:
        differ = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
        raise PruningError(
            f"The adapters do not fit the pruned model: {len(differ)} of their {len(expected)} tensors differ, such as "
            f"{differ[0]} ({expected.get(differ[0], 'not')} in the original, {shapes.get(differ[0], 'not')} here). Merge them "
            "first: `model.merge_and_unload()`."
        )
    for name, new_name in wanted.items():
        (source, key), (target, new_key) = old[name], new[new_name]
        value = getattr(source, key)
        if isinstance(value, nn.Parameter):
            target._parameters[new_key] = nn.Parameter(value.data, requires_grad=value.requires_grad)
        else:
            target._buffers[new_key] = value
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, parameter in made.named_parameters(remove_duplicate=False):
        parameter.requires_grad = flags.get(names.old(name), False)
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    for name, module in made.named_modules(remove_duplicate=False):
        module.training = modes.get(names.old(name), model.training)


def _adapter_tensors(model: PeftModel) -> dict[str, tuple[nn.Module, str]]:
    """Where the tensors are that the adapters have added, by name."""
    base = {id(module) for _, module, _ in base_modules(base_of(model))}
    return {
        f"{path}.{key}": (module, key)
        for path, module in model.named_modules()
        if id(module) not in base
        for key, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None
    }


def each_adapter(*models: PeftModel) -> Iterator[str]:
    """Makes each adapter in turn the active one of all models; afterwards the first model is as it was."""
    first = models[0]
    if first.active_peft_config.is_prompt_learning or len(first.peft_config) == 1:
        yield from first.active_adapters
        return
    active, flags = first.active_adapters, [(each, each.requires_grad) for each in first.parameters()]
    try:
        for name in first.peft_config:
            for model in models:
                model.set_adapter(name)
            yield name
    finally:
        for model in models:
            model.base_model.set_adapter(active)
        for parameter, flag in flags:
            parameter.requires_grad = flag


def save_adapters(model: PeftModel, folder: Path, repo_id: str | None) -> None:
    """Writes each adapter into a folder of its name, as PEFT loads it; without a local path in its config."""
    from peft import get_peft_model_state_dict

    for name, config in model.peft_config.items():
        saved = copy.deepcopy(config)
        saved.base_model_name_or_path, saved.revision, saved.inference_mode = repo_id, None, True
        target = folder / FOLDER / name
        saved.save_pretrained(target)
        # The embeddings are in the base model beside it, resized or not.
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        tensors = {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapters(base: PreTrainedModel, folder: Path, names: Sequence[str]) -> PeftModel:
    """The adapters of `save_adapters` on the base model beside them."""
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(base, folder / FOLDER / names[0], adapter_name=names[0])
    for name in names[1:]:
        loaded.load_adapter(folder / FOLDER / name, adapter_name=name)
    return loaded


def _renumbered(model: PeftModel, adapter: str, names: Renaming, pruned: PreTrainedModel) -> PeftConfig:
    """The config of an adapter for the pruned model: as it was written where that means the same, else module by module."""
    from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
    from peft.utils.other import get_pattern_key

    config = copy.deepcopy(model.peft_config[adapter])
    tuned = {}
    for old, _, around in base_modules(base_of(model)):
        if not isinstance(around, BaseTunerLayer):  # what is trained whole, or by token, is named in fields of its own
            continue
        if adapter in around._get_available_adapters() and (new := names.new(old)) is not None:
            tuned[new] = around
    whole = (getattr(config, field, None) for field in ("modules_to_save", "trainable_token_indices"))
    if not tuned and not any(whole):
        raise PruningError(
            f"The adapter {adapter!r} is on removed layers only; kept are {', '.join(f'{list(k)} of {p!r}' for p, k in names.kept.items())}."
        )
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # PiSSA and its like would take the weights apart again
    for field, attributes in (("rank_pattern", ("r",)), ("alpha_pattern", ("lora_alpha", "alpha"))):
        if pattern := getattr(config, field, None):
            attribute = next(each for each in attributes if hasattr(config, each))
            sizes = {new: getattr(around, attribute)[adapter] for new, around in tuned.items()}
            default = getattr(config, attribute)
            if any(pattern.get(get_pattern_key(pattern, new), default) != size for new, size in sizes.items()):
                setattr(config, field, sizes)
    if (layers := getattr(config, "layers_to_transform", None)) is not None:
        layers = [layers] if isinstance(layers, int) else layers
        keep = next(iter(names.kept.values()))
        config.layers_to_transform = [keep.index(i) for i in layers if i in keep]
    matches = {new for new, _ in pruned.named_modules() if check_target_module_exists(config, new)}
    if matches != set(tuned) and hasattr(config, "target_modules") and not getattr(config, "target_parameters", None):
        config.target_modules = set(tuned)
        for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if hasattr(config, field):
                setattr(config, field, None)
        if getattr(config, "feedforward_modules", None):
            config.feedforward_modules = {new for new, around in tuned.items() if around.is_feedforward}
    return config
