"""The pass itself: what waits for the device, resuming and adding up, processes, recomputed and compiled layers, bad input."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_token_masks import Blocks, lengths_mask
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from hf_layerprobe import find_stacks, score_layers
from hf_layerprobe.activations import LayerStream
from hf_layerprobe.scores.registry import SCORES
from hf_layerprobe.stacks import LayerStack

STREAMED = [name for name, score in SCORES.items() if score.streams]
# Scores whose numbers are sums over tokens or sequences; the others read a random sample of tokens.
SUMMED = [name for name in STREAMED if name not in ("cka", "stable-rank", "lid")]
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "equal.default",
    "bincount",
    "is_nonzero",
    "item",
)


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for the values of a tensor, and copies between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(waiting in name for waiting in WAITING), f"{name} waits for the device"
        indices = args[1] if "aten.index." in name else ()
        assert not any(i is not None and i.dtype == torch.bool for i in indices), f"{name} by a mask waits"
        assert (kwargs or {}).get("device") is None or "_to_copy" not in name, f"{name} moves between devices"
        return func(*args, **(kwargs or {}))


class Strict:
    """An accumulator that may not wait."""

    def __init__(self, inner):
        self.inner = inner
        self.sites = getattr(inner, "sites", ())

    def update(self, *args, **sites):
        with NoWaiting():
            self.inner.update(*args, **sites)


@pytest.mark.parametrize("name", STREAMED)
def test_nothing_waits_for_the_device(name, token_batches):
    model = tiny_model("llama")
    stack = find_stacks(model)[0]
    strict, free = Strict(SCORES[name].make(4)), SCORES[name].make(4)
    with LayerStream(stack, [strict, free]), torch.no_grad():
        for batch in token_batches:
            model(**batch)
    read = SCORES[name].read
    np.testing.assert_array_equal(read(strict.inner)[0], read(free)[0])


@pytest.mark.parametrize("name", [name for name in STREAMED if not name.startswith("influence-")])
def test_no_branch_depends_on_values(name):
    """A meta tensor has no values: reading one, copying it to the host or a shape that depends on it is an error."""
    model, accumulator = Blocks(devices=("meta", "meta")), SCORES[name].make(2)
    with LayerStream(LayerStack(model, "layers"), [accumulator]), torch.no_grad():
        for _ in range(2):
            model(torch.ones(2, 6, dtype=torch.long, device="meta"), lengths_mask([6, 3], 6).to("meta"))


def filled(name, batches, accumulator=None):
    model = tiny_model("llama")
    accumulator = accumulator or SCORES[name].make(4)
    with LayerStream(find_stacks(model)[0], [accumulator]), torch.no_grad():
        for batch in batches:
            model(**batch)
    return accumulator


@pytest.mark.parametrize("name", STREAMED)
def test_stop_resume_and_merge(name, token_batches):
    read = SCORES[name].read
    expected = read(filled(name, token_batches))[0]
    resumed = SCORES[name].make(4)
    resumed.load_state_dict(copy.deepcopy(filled(name, token_batches[:1]).state_dict()))
    np.testing.assert_allclose(read(filled(name, token_batches[1:], resumed))[0], expected, rtol=1e-6)
    merged = filled(name, token_batches[:2])
    merged.merge(filled(name, token_batches[2:]))
    merged.merge(SCORES[name].make(4))
    np.testing.assert_allclose(read(merged)[0], expected, rtol=1e-6)
    assert all(isinstance(value, torch.Tensor) and not value.is_cuda for value in merged.state_dict().values())


SHARED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from accelerate import Accelerator
from test_pass import SUMMED, loader_of
from tiny import tiny_model
from hf_layerprobe import score_layers
accelerator = Accelerator(cpu=True)
for rows in (8, 7):
    loader = accelerator.prepare(loader_of(rows))
    found = score_layers(tiny_model("llama"), loader, by=SUMMED)
    json.dump(
        {"data": found["influence"].data, "values": {name: scores.values.tolist() for name, scores in found.items()}},
        open(f"{sys.argv[2]}/{accelerator.process_index}-{rows}.json", "w"),
    )
accelerator.end_training()
"""


def loader_of(rows):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 60, (9,), generator=generator) for _ in range(rows)]
    masks = lengths_mask([9 - i % 4 for i in range(rows)], 9)
    data = [{"input_ids": row, "attention_mask": mask} for row, mask in zip(ids, masks, strict=True)]
    return torch.utils.data.DataLoader(data, batch_size=2)


def test_two_processes_equal_one(tmp_path):
    """Also with 7 rows, of which `accelerate` repeats one."""
    (tmp_path / "run.py").write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29592"]
    tests = Path(__file__).parent
    subprocess.run([*command, tmp_path / "run.py", tests, tmp_path], check=True, timeout=300, capture_output=True)
    for rows in (8, 7):
        alone = score_layers(tiny_model("llama"), loader_of(rows), by=[n for n in SUMMED if n != "avss-released"])
        found = [json.loads((tmp_path / f"{rank}-{rows}.json").read_text()) for rank in (0, 1)]
        assert found[0] == found[1]
        for name, scores in alone.items():
            np.testing.assert_allclose(found[0]["values"][name], scores.values, rtol=1e-6, err_msg=name)
        assert {k: found[0]["data"][k] for k in ("tokens", "sequences")} == {
            k: alone["influence"].data[k] for k in ("tokens", "sequences")
        }


def test_recomputed_layers_count_once(token_batches):
    model = tiny_model("llama").train()
    expected = filled("influence", token_batches)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    found = SCORES["influence"].make(4)
    with LayerStream(find_stacks(model)[0], [found]):
        for batch in token_batches:
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    assert model.model.layers[0].gradient_checkpointing and model.model.layers[0].mlp.up_proj.weight.grad is not None
    assert found.turns.state_dict()["tokens"].tolist() == [37] * 4
    np.testing.assert_allclose(found.compute()[0], expected.compute()[0], rtol=1e-5)


@pytest.mark.parametrize("when", ["before", "never"])
def test_compiled_models_count_once(when, token_batches):
    """Compiled graphs know no hooks that come later."""
    expected = score_layers(tiny_model("llama"), token_batches, by="influence")
    model = torch.compile(tiny_model("llama"), backend="eager")
    if when == "before":
        with torch.no_grad():
            model(**token_batches[0], use_cache=False)
    found = score_layers(model, token_batches, by="influence")
    assert found.data["tokens"] == 37
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-6)


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(0, 1000),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=25)
def test_batches_order_and_padding_do_not_matter(lengths, dtype, seed, padding):
    """The same tokens, one sequence at a time in another order and with more padding, which holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    before, update = torch.randn(2, len(lengths), 9, 48, generator=generator).to(dtype).unbind(0)
    before[0, 0, 5] = 300  # a massive activation
    after = before + update / 3
    mask = lengths_mask(lengths, 9).bool()
    names = [name for name in SUMMED if name != "avss-released" and not getattr(SCORES[name].make(1), "sites", ())]
    whole, parts = ({name: SCORES[name].make(1) for name in names} for _ in range(2))
    for name in names:
        whole[name].update(0, before, after, mask)
        for i in reversed(range(len(lengths))):
            more = torch.full((1, padding, 48), torch.nan, dtype=dtype)
            row = mask[i : i + 1]
            longer = torch.cat([row, row.new_zeros(1, padding)], 1)
            parts[name].update(0, *(torch.cat([x[i : i + 1], more], 1) for x in (before, after)), longer)
        one, other = (SCORES[name].read(each[name]) for each in (whole, parts))
        np.testing.assert_allclose(other[0], one[0], rtol=1e-6, err_msg=name)
        for key in one[1]:
            np.testing.assert_allclose(other[1][key], one[1][key], rtol=1e-6, err_msg=f"{name} {key}")
    x, y = (values.double()[mask].numpy() for values in (before, after))
    v = (y - x) / np.sqrt((x**2).mean(-1, keepdims=True))
    details = whole["avss-relative"].compute()[1]
    np.testing.assert_allclose(details["variance"], v.var(), rtol=1e-6)
    np.testing.assert_allclose(details["sparsity"], max((np.abs(v) < 0.05).mean(), 1 / v.size), rtol=1e-12)
    details = whole["avss-published"].compute()[1]
    np.testing.assert_allclose(details["variance"], y.var(), rtol=1e-9)
    cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    np.testing.assert_allclose(whole["influence"].compute()[0], 1 - cosines.mean(), rtol=1e-5, atol=1e-9)


def test_a_large_mean_costs_no_precision():
    """Mean 1000, deviation 1: float32 sums of squares would leave two digits."""
    after = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(0)) + 1000
    found = SCORES["avss-published"].make(1)
    found.update(0, after, after, None)
    np.testing.assert_allclose(found.compute()[1]["variance"], after.double().var(correction=0), rtol=1e-9)
