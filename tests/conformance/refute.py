"""Tries to refute every refusal in the list of supported models: `python -m tests.conformance.refute [TYPE…]`.

By brute force, with nothing of the library's own rules: every edit of the config that could leave only the kept layers is
tried out, each with the kept layers' tensors under their new names, until one computes what the original does with the
removed layers bypassed. A set for which one is found was refused wrongly.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, combinations, product
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from hf_layerprobe import LayerProbeError, LayerStack, find_stacks, supported
from hf_layerprobe.surgery.inputs import example_inputs

from .compare import difference, entries_of_kept, outputs, without
from .pool import run
from .trial import Runnable, TooLong, at_most

TOLERANCE = 1e-5
LONGEST = 20  # seconds of computing for one set
# Numbers and switches that may say which layers are of which kind; others are not layers' business.
PATTERN = re.compile(r"layer|block|period|offset|step|freq|interval|pattern|every|stagger|sparse|dense|window|distil")

# What differs does not show on any input that could be made.
EXEMPT = {
    "lightglue": "thresholds of confidence, which a random model's do not reach, follow from the number of layers",
    "pegasus_x": "which layers stagger their blocks shows on texts longer than a block alone",
}

Edit = dict[str, Any]


def main() -> int:
    stored = supported.read()["types"]
    types = sys.argv[1:] or [name for name, record in stored.items() if _refused(record)]
    verdicts: Counter[str] = Counter()
    for name, found in run(types, 2, judge).items():
        for path, removed, verdict in found:
            verdicts[verdict.split(":")[0]] += 1
            print(f"{name} {path} without {removed}: {verdict}")
    print(", ".join(f"{number} {verdict}" for verdict, number in verdicts.items()))
    return 1 if verdicts["refuted"] else 0


def judge(model_type: str) -> list[tuple[str, str, str]]:
    """Stack, removed layers, and the verdict for each refused set of a type.

    It starts with `"refuted"`, `"stands"`, `"stands so far"` (not everything could be tried in time) or `"not judged"`.
    """
    record, found, results = supported.read()["types"][model_type], Runnable(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.search(model_type)
        stacks = {stack.path: stack for stack in find_stacks(found.model)}
        for path, removed in _refused(record):
            verdict = f"stands so far: not everything was tried in {LONGEST} s of computing"
            with suppress(TooLong), at_most(LONGEST):
                verdict = _verdict(found.model, stacks.get(path), [int(i) for i in removed.split(", ")])
            results.append((path, removed, verdict))
    return results


def _verdict(model: PreTrainedModel, stack: LayerStack | None, removed: Sequence[int]) -> str:
    if stack is None:
        return "not judged: no stack any more"
    if reason := EXEMPT.get(model.config.model_type):
        return f"not judged: {reason}"
    try:
        how = _refutation(model, stack, removed)
    except LayerProbeError:
        return "not judged: no inputs are known on which these layers run"
    return "stands" if how is None else f"refuted: equal with {how}"


def _refused(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (stack["path"], removed)
        for stack in record["stacks"]
        for removed, outcome in stack["sets"].items()
        if outcome.startswith("refused")
    ]


def _refutation(model: PreTrainedModel, stack: LayerStack, removed: Sequence[int]) -> str | None:
    """The edit of the config with which the other layers compute the same; None if none was found."""
    keep = [i for i in range(stack.num_layers) if i not in removed]
    given = list(_inputs(model, [stack.layers[i] for i in removed]))
    for place, edit in _edits(model.config, stack.num_layers, keep):
        try:
            config = _edited(model.config, place, edit)
            with torch.device("meta"):
                small = type(model)(config)
            lists = _shortened(model, small, stack.num_layers, keep)
            if stack.path not in lists or (sources := _sources(model, small, lists)) is None:
                continue
            torch.manual_seed(0)
            small, tensors = type(model)(_edited(model.config, place, edit)).eval(), model.state_dict()
            small.load_state_dict({name: tensors[source] for name, source in sources.items()})
            if all(_is_equal(model, small, stack, lists, removed, inputs) for inputs in given) and (
                _generates(small, given[-1]) or not _generates(model, given[-1])
            ):
                return f"{'.'.join((*place, ''))}{edit}"
        except Exception:  # whatever configs, constructors and forward passes raise: no refutation
            continue
    return None


def _inputs(model: PreTrainedModel, layers: Sequence[nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """What to compare on: larger images, too, for some windows are as large as all of a small one."""
    inputs = example_inputs(model, layers)
    if (pixels := inputs.get("pixel_values")) is not None and pixels.dim() == 4:
        larger = {**inputs, "pixel_values": nn.functional.interpolate(pixels, scale_factor=2)}
        with suppress(Exception):
            outputs(_anew(model), larger)
            yield larger
    yield inputs


def _anew(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that has never run: Swin's layers remember the size of an image."""
    new = type(model)(copy.deepcopy(model.config)).eval()
    new.load_state_dict(model.state_dict())
    return new


def _is_equal(
    model: PreTrainedModel,
    small: PreTrainedModel,
    stack: LayerStack,
    lists: dict[str, list[int]],
    removed: Sequence[int],
    inputs: dict[str, torch.Tensor],
) -> bool:
    model, small = _anew(model), _anew(small)
    bypassed = [model.get_submodule(path) for path in (stack.path, *(path for path in lists if path != stack.path))]
    with without([each for each in bypassed if len(each) == stack.num_layers], removed):
        expected = outputs(model, inputs)
    found = outputs(small, inputs)
    return difference(entries_of_kept(expected, found, stack.num_layers, removed), found) <= TOLERANCE


def _edited(config: PreTrainedConfig, place: tuple[str, ...], edit: Edit) -> PreTrainedConfig:
    """By way of its file, as a reload would read it."""
    content = _content(config)
    node = content
    for name in place:
        node = node[name]
    node.update(copy.deepcopy(edit))
    with tempfile.TemporaryDirectory() as folder:
        type(config).from_dict(content).save_pretrained(folder)
        return type(config).from_pretrained(folder)


def _content(config: PreTrainedConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=False))


def _nodes(content: dict[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    yield place, content
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _nodes(value, (*place, name))


def _edits(config: PreTrainedConfig, number: int, keep: Sequence[int]) -> Iterator[tuple[tuple[str, ...], Edit]]:
    """Edits to try, the plain ones first: those of all nodes, then with one number or switch changed beside, then two."""
    plain: list[tuple[tuple[str, ...], dict[str, Any], Edit]] = []
    for place, node in _nodes(_content(config)):
        for count in _counts(node, number, len(keep)):
            plain += [(place, node, count | lists) for lists in _lists(node, number, keep)]
    yield from ((place, edit) for place, _, edit in plain)
    for together in (1, 2):
        for place, node, edit in plain:
            for names in combinations([name for name in _patterns(node, number) if name not in edit], together):
                for values in product(*(_values(node[name], len(keep)) for name in names)):
                    changed = dict(zip(names, values, strict=True))
                    if all(node[name] != value for name, value in changed.items()):
                        yield place, edit | changed


def _counts(node: dict[str, Any], number: int, kept: int) -> Iterator[Edit]:
    """What could set the number of layers."""
    for name, value in node.items():
        if type(value) is int and abs(value - number) <= 1:
            yield {name: value - number + kept}
        elif isinstance(value, list):
            yield from ({name: [*value[:i], kept, *value[i + 1 :]]} for i, entry in enumerate(value) if entry == number)
    yield {}  # a list of layers may be all there is


def _lists(node: dict[str, Any], number: int, keep: Sequence[int]) -> Iterator[Edit]:
    """Lists with an entry for each layer cut to the kept ones, lists of layers renumbered, kinds that are repeated
    written out: all of them, none, each alone."""
    new, edits = {old: index for index, old in enumerate(keep)}, []
    for name, value in node.items():
        if not isinstance(value, list) or not value:
            continue
        if len(value) == number:
            edits.append({name: [value[i] for i in keep]})
        if all(type(entry) is int and 0 <= entry <= number for entry in value) and value == sorted(value):
            edits.append({name: [new[entry] for entry in value if entry in new]})
        if len(value) < number and isinstance(value[0], str):
            edits.append({name: [value[i % len(value)] for i in keep]})
    yield dict(chain.from_iterable(edit.items() for edit in edits))
    yield {}
    if len(edits) > 1:
        yield from edits


def _patterns(node: dict[str, Any], number: int) -> list[str]:
    # What equals the number of layers may count those of another stack.
    numbers = [name for name, value in node.items() if isinstance(value, (bool, int)) and value != number]
    return [name for name in numbers if PATTERN.search(name)]


def _values(value: bool | int, kept: int) -> Iterable[bool | int]:
    return (not value,) if isinstance(value, bool) else range(kept + 2)


def _shortened(model: nn.Module, small: nn.Module, number: int, keep: Sequence[int]) -> dict[str, list[int]]:
    """Lists that have become shorter, outermost ones, with the entries that stay; lists of one less than layers, too."""
    old = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    lists: dict[str, list[int]] = {}
    for name, module in small.named_modules():
        if isinstance(module, nn.ModuleList) and old.get(name) != len(module):
            if any(name.startswith(f"{outer}.") for outer in lists):
                continue
            if (old.get(name), len(module)) == (number, len(keep)):
                lists[name] = list(keep)
            elif (old.get(name), len(module)) == (number - 1, len(keep) - 1):
                lists[name] = list(keep[:-1])
    return lists


def _sources(model: nn.Module, small: nn.Module, lists: dict[str, list[int]]) -> dict[str, str] | None:
    """Where each tensor comes from, by its new name; None if one has no counterpart of the same shape."""
    old, sources = {name: tensor.shape for name, tensor in model.state_dict().items()}, {}
    for name, tensor in small.state_dict().items():
        source = name
        for path, entries in lists.items():
            if match := re.match(rf"{re.escape(path)}\.(\d+)\.", name):
                source = f"{path}.{entries[int(match[1])]}.{name[match.end() :]}"
        if old.get(source) != tensor.shape:
            return None
        sources[name] = source
    return sources


def _generates(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> bool:
    prompt = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    try:
        GenerationMixin.generate(model, **prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
    except Exception:  # it has no generation, or none on these inputs
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
