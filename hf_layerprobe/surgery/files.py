"""`prune_checkpoint`: layers removed from the files of a checkpoint, without loading the model.

Tensors keep the names, the formats and the order that they have on disk; only the layers' numbers in the names change.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.utils import CHAT_TEMPLATE_DIR, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import LayerProbeError, PruningError
from ..files import check_new_folder, new_folder
from ..loading import check_runs, load_class
from ..plan import PruningPlan, plan_pruning, to_carry_out
from ..progress import progress
from ..stacks import LayerStack, resolve_stack
from ..stacks.admissible import expressible
from ..stacks.edit import StackEdit
from ..weights.checksum import Read, file_values, sign_checksum
from ..weights.conversion import find_sources
from ..weights.rewrite import rewrite
from ..weights.shards import Shards
from .gate import verify as verify_pruned
from .generation import renumbered

# Of what lies beside the weights, what describes them, and other formats of the same weights.
NOT_COPIED = (
    "config.json", "README.md", "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf",
    "*.onnx", "*.ot", "pruning_plan.json", "adapter_*", "trainer_state.json",
)  # fmt: skip
# Quantisation settings beside the config, which name modules too.
QUANTISATION_FILES = ("quantize_config.json", "hf_quant_config.json")
MODULES_FILE = "modules.json"


def prune_checkpoint(
    name_or_path: str | Path,
    plan: PruningPlan | str | Path | None = None,
    *,
    remove: Iterable[int] | Mapping[str, Iterable[int]] | None = None,
    keep: Iterable[int] | Mapping[str, Iterable[int]] | None = None,
    stack: str | None = None,
    output_dir: str | Path,
    verify: bool = True,
    token: str | bool | None = None,
) -> Path:
    """Removes layers from the safetensors files of a checkpoint, without loading the model: memory does not grow with it.

    Whether the architecture can lose the layers, and whether the new files have every tensor that the new model needs, is
    looked at before anything is written or (from the Hub) the weights are downloaded. Tokenizer, generation config, licence
    and the like are copied.

    Args:
        name_or_path: A folder, or a Hub id.
        plan: A plan, or the file, folder or Hub id of one; else say what to remove.
        remove: Layers to remove (0-based), or a dict of them by stack.
        keep: Layers to keep (0-based), or a dict of them.
        stack: Path of the stack; the main one by default.
        output_dir: A new or empty folder.
        verify: Then also run the new model and the old one, mapped from their files (they need address space, not memory of
            their own), and compare them as [`prune_layers`] does. Quantised ones run where their package does; some packages
            dequantise them for that, which takes memory.
        token: The token for the Hub.

    Returns:
        The folder.

    Raises:
        PruningError: The kept set cannot be expressed, the plan is for another model, or `verify` is asked for of a
            quantised model that does not run here.
        VerificationError: The new model does not compute what the old one does with those layers bypassed.
        LayerProbeError: No safetensors checkpoint, one that is damaged, or one whose names do not tell the layers.
    """
    output_dir, name = Path(output_dir), str(name_or_path)
    check_new_folder(output_dir)
    config, model_class = load_class(name, token=token)
    settings = getattr(config, "quantization_config", None)
    with torch.device("meta"):
        model = model_class(config)
    model.config.name_or_path = name
    given = plan is not None
    if not given:
        plan = plan_pruning(model, remove=remove, keep=keep, stack=stack)
    elif remove is not None or keep is not None or stack is not None:
        raise PruningError("Pass a plan, or say what to remove; not both.")
    else:
        plan = to_carry_out(plan, token=token)
    stacks = [resolve_stack(model, part.stack) for part in plan.parts]
    for part, found in zip(plan.parts, stacks, strict=True):
        part.check_fits(found)  # their number: the values are in the files
    edit = expressible({found: part.keep for part, found in zip(plan.parts, stacks, strict=True)})
    moved = {**edit.sources, **edit.computed}
    if moved:
        raise PruningError(
            f"Without those layers {', '.join(sorted(moved)[:3])} has to be computed or to come from another layer, which is not "
            "done on files; load the model: `prune_layers(load it, ...)`, or `hf-layerprobe prune`."
        )
    shards = Shards(name, token=token)
    in_files = {_place(model, path, shards.keys): path for path in edit.kept}
    renaming = _Renaming(edit, in_files)
    _check_complete(model, edit, shards, renaming)
    in_modules = {tuple(path.split(".")): path for path in edit.kept}
    of_modules = _Renaming(edit, {**in_files, **in_modules})
    settings = _renumbered(settings, of_modules, model)
    if verify:
        try:
            check_runs(config)
        except LayerProbeError as error:
            raise _not_comparable(error) from error
    shards.locate(shards.keys)
    read = file_values(model, shards)
    if given:
        for part, found in zip(plan.parts, stacks, strict=True):
            part.check_fits(found, read)
    else:
        plan = _signed(plan, stacks, read)

    with new_folder(output_dir) as folder:
        _copy_others(name, folder, token)  # before the tensors: what these files name may be refused
        for file in QUANTISATION_FILES:
            _change(folder / file, lambda values: _renumbered(values, of_modules, model))
        _copy_tensors(shards, folder, renaming)
        new_config = edit.model.config
        new_config.architectures = config.architectures
        new_config.dtype = config.dtype
        if settings is not None:
            new_config.quantization_config = settings
        new_config.save_pretrained(folder)
        _change(folder / GENERATION_CONFIG_NAME, lambda values: renumbered(values, model, edit.kept))
        plan.save(folder)

        from ..report import write_card  # the last room: it stands behind this one

        write_card(folder, model)
        if verify:
            _compare(model_class, name, folder, plan, token)
    return output_dir


class _Renaming:
    """New names of tensors in the files, by the stack whose layers stand at each place."""

    def __init__(self, edit: StackEdit, places: Mapping[tuple[str, ...], str]):
        self.kept = {place: {old: new for new, old in enumerate(edit.kept[path])} for place, path in places.items()}
        self.num_layers = {place: edit.num_layers[path] for place, path in places.items()}

    def place(self, key: str) -> tuple[str, ...] | None:
        """What stands before the layer's number, if it is the name of something in one of the layers."""
        parts = key.split(".")
        for place in self.kept:
            if tuple(parts[: len(place)]) == place and len(parts) > len(place) and parts[len(place)].isdigit():
                return place
        return None

    def __call__(self, key: str) -> str | None:
        """The new name, or None for a tensor of a removed layer."""
        place = self.place(key)
        if place is None:
            return key
        digits, *rest = key.split(".")[len(place) :]
        number, kept, total = int(digits), self.kept[place], self.num_layers[place]
        # What predicts further tokens (GLM-4.5, DeepSeek-V3) stands in the files as layers behind the last one.
        new = kept.get(number) if number < total else number - total + len(kept)
        return None if new is None else ".".join([*place, str(new), *rest])


def _place(model: PreTrainedModel, path: str, keys: Sequence[str]) -> tuple[str, ...]:
    """What stands before the layers' numbers in the files' names; `("h",)` for `h.0.attn.weight`, where `path` is
    `transformer.h`.

    Raises:
        LayerProbeError: The names do not tell the layers apart.
    """
    places = None
    for name, source in find_sources(model, keys).items():
        if not name.startswith(f"{path}."):
            continue
        layer = name[len(path) + 1 :].split(".")[0]
        for key, _ in source.keys:
            parts = key.split(".")
            found = {tuple(parts[:at]) for at, part in enumerate(parts) if part == layer}
            places = found if places is None else places & found
    if not places or len(places) != 1:
        raise LayerProbeError(
            f"The names of the tensors in the checkpoint do not tell which layer of {path!r} they belong to (such as "
            f"{min(keys, default=None)!r}); load the model and prune it in memory."
        )
    return next(iter(places))


def _check_complete(model: PreTrainedModel, edit: StackEdit, shards: Shards, renaming: _Renaming) -> None:
    """Every parameter that the old model finds in its files, the new one finds in its own."""
    new = edit.model
    new_keys = [renamed for key in shards.keys if (renamed := renaming(key)) is not None]
    if len(set(new_keys)) != len(new_keys):
        raise LayerProbeError(
            "Two tensors of the checkpoint would get the same name; load the model and prune it in memory."
        )
    # Some parameters are in no file: tied ones, and those that quantised weights stand for.
    without = model.state_dict().keys() - find_sources(model, shards.keys).keys()
    new_without = new.state_dict().keys() - find_sources(new, new_keys).keys()
    missing = [name for name in new_without if edit.source(name) not in without]
    if missing:
        raise LayerProbeError(
            f"The pruned {type(new).__name__} would find no tensor for {len(missing)} of its parameters, such as {min(missing)!r}; "
            "load the model and prune it in memory."
        )


def _not_comparable(error: Exception) -> PruningError:
    why = str(error).rstrip(".")
    return PruningError(f"{why}. So the result could not be compared with it; verify=False goes without.")


def _signed(plan: PruningPlan, stacks: Sequence[LayerStack], read: Read) -> PruningPlan:
    """The plan with the checksum of the layers in the files, which the model without weights could not give it."""
    parts = [
        replace(part, model={**part.model, "checksum": sign_checksum(found, read) or ""})
        for part, found in zip(plan.parts, stacks, strict=True)
    ]
    return replace(parts[0], also=tuple(parts[1:]))


def _copy_tensors(shards: Shards, folder: Path, renaming: _Renaming) -> None:
    written: list[tuple[Path, dict[str, int]]] = []
    for source in progress(shards.files(), desc="Copying", unit="file"):
        target = folder / f"part-{len(written)}"
        if sizes := rewrite(source, target, renaming):
            written.append((target, sizes))
    if len(written) == 1:
        written[0][0].rename(folder / SAFE_WEIGHTS_NAME)
        return
    weight_map = {}
    for number, (path, sizes) in enumerate(written, 1):
        shard = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / shard)
        weight_map |= dict.fromkeys(sizes, shard)
    total = sum(sum(sizes.values()) for _, sizes in written)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_others(name: str, folder: Path, token: str | bool | None) -> None:
    source = Path(name)
    if not source.is_dir():
        source = Path(snapshot_download(name, ignore_patterns=list(NOT_COPIED), token=token))
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith(".") and not any(path.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
    modules = source / MODULES_FILE
    parts = json.loads(modules.read_text(encoding="utf-8")) if modules.is_file() else []
    # Of folders a tokenizer's templates, and what stands behind the model in Sentence Transformers (`1_Pooling`).
    wanted = {CHAT_TEMPLATE_DIR, *(Path(part["path"]).name for part in parts)} - {""}
    if parts and not Path(name).is_dir():
        source = Path(snapshot_download(name, allow_patterns=[f"{each}/*" for each in wanted], token=token))
    for each in wanted:
        if (source / each).is_dir():
            shutil.copytree(source / each, folder / each)


def _change(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Changes what a file of settings holds, if it is there."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (new := change(old)) != old:
        path.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")


def _renumbered(value: Any, renaming: _Renaming, model: PreTrainedModel) -> Any:
    """Quantisation settings in which lists and keys that name modules name them by their new numbers.

    Raises:
        PruningError: A pattern or name that means single layers in another way.
    """
    if isinstance(value, dict):
        renamed = {_renumbered(key, renaming, model): _renumbered(item, renaming, model) for key, item in value.items()}
        return {key: item for key, item in renamed.items() if key is not None}
    if isinstance(value, (list, tuple)):
        renamed = [_renumbered(item, renaming, model) for item in value]
        return [new for new, old in zip(renamed, value, strict=True) if new is not None or old is None]
    if not isinstance(value, str):
        return value
    lists = "|".join(re.escape(place[-1]) for place in renaming.kept)
    # As a name with a number, or as a pattern with one between dots, without the name before it (GPTQModel's).
    numbered = rf"(^|\W)({lists})\W+\d|\\\.\W*\d"
    by_number = renaming.place(value) is None and re.search(numbered, value)
    # Lists of other parts of the model may have the same name; these keep their numbers.
    if by_number and value not in dict(model.named_modules()):
        raise PruningError(
            f"The quantisation settings name layers by {value!r}, which cannot be given the layers' new numbers: only names such "
            f"as {'.'.join(next(iter(renaming.kept)))}.3.… can. Write each module's name into the config, or prune the unquantised "
            "model and quantise the result."
        )
    return renaming(value)


def _compare(
    model_class: type[PreTrainedModel], name: str, folder: Path, plan: PruningPlan, token: str | bool | None
) -> None:
    # Weights in the dtype that they are stored in stay pages of their files.
    try:
        old = model_class.from_pretrained(name, dtype="auto", token=token)
    except ImportError as error:  # of kernels that no check asks for
        raise _not_comparable(error) from error
    new = model_class.from_pretrained(folder, dtype="auto", local_files_only=True)
    verify_pruned({resolve_stack(old, part.stack): part.remove for part in plan.parts}, new)
