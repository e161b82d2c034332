"""Maps: rivals through the same function, experts, samples, gaps, resuming, sharing, and the result's own methods."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from tiny import GQA, redrawn, tiny_model

from hf_layerprobe import LayerProbeError, SimilarityMatrix, docs, docs_similarity
from hf_layerprobe.scores import layer_map, units
from hf_layerprobe.scores.indices import INDICES
from hf_layerprobe.weights import layer_matrices


@pytest.mark.parametrize("index", INDICES)
def test_rivals_go_through_the_same_function(index):
    model = tiny_model("llama")
    found = docs(model, kinds=["q"], index=index)
    function = INDICES[index].function
    weights = [layer.self_attn.q_proj.weight.detach() for layer in model.model.layers]
    expected = [[function(x, y) for y in weights] for x in weights]
    np.testing.assert_allclose(found["q"], expected, rtol=1e-4, atol=1e-6)
    assert found.index == index and np.isnan(found.chance["q"])
    columns = docs(model, kinds=["q"], index=index, axis="in")["q"][0, 1]
    assert columns == pytest.approx(function(weights[0].T, weights[1].T), rel=1e-4)


def test_experts_within_and_across_layers():
    model = tiny_model("mixtral")
    found = docs(model, kinds=["q", "down"], experts=True, layers=[0, 2])
    assert found.rows["q"] == ["0", "2"]
    assert found.rows["down"] == [f"{layer}.{expert}" for layer in (0, 2) for expert in range(3)]
    experts = [model.model.layers[i].mlp.experts.down_proj.detach() for i in (0, 2)]
    assert found["down"][1, 5] == pytest.approx(docs_similarity(experts[0][1], experts[1][2]))
    assert found["down"][0, 2] == pytest.approx(docs_similarity(experts[0][0], experts[0][2]))


def test_some_layers():
    model = tiny_model("llama")
    everything, some = docs(model, kinds=["q"]), docs(model, kinds=["q"], layers=[3, 1])
    np.testing.assert_allclose(some["q"], everything["q"][np.ix_([1, 3], [1, 3])])
    assert some.columns["q"] == ["1", "3"]
    with pytest.raises(LayerProbeError, match=r"layers: \[4\] do not exist; the stack has layers 0 to 3"):
        docs(model, layers=[4])


def test_a_sample_has_the_error_it_states():
    """Over many seeds, the deviation from the full value is what the standard error says."""
    generator = torch.Generator().manual_seed(0)
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight = torch.nn.Parameter(torch.randn(400, 32, generator=generator))
    full = docs(model, kinds=["q"])
    runs = [docs(model, kinds=["q"], sample=60, seed=seed) for seed in range(40)]
    off = ~np.eye(4, dtype=bool)
    deviation = np.sqrt(np.mean([(run["q"] - full["q"])[off] ** 2 for run in runs]))
    stated = np.mean([run.standard_error["q"][off] for run in runs])
    assert deviation == pytest.approx(stated, rel=0.35)
    whole = docs(model, kinds=["q"], sample=400)
    np.testing.assert_allclose(whole["q"], full["q"], atol=1e-6)
    assert (whole.standard_error["q"] == 0).all() and not full.standard_error
    with pytest.raises(LayerProbeError, match="sample is a number of vectors"):
        docs(model, sample=60, index="cka")


def test_gaps_are_marked_and_explained():
    """Layers of different widths, a layer without the matrix, and one of zeros."""
    model = tiny_model("llama")
    layers = model.model.layers
    layers[1].mlp.down_proj = torch.nn.Linear(40, 32, bias=False)
    del layers[2].mlp.gate_proj
    layers[3].self_attn.k_proj.weight.data.zero_()
    found = docs(model)
    assert np.isnan(found["down"][1, [0, 2, 3]]).all() and found["down"][1, 1] == 1
    assert np.isfinite(found["down"][np.ix_([0, 2, 3], [0, 2, 3])]).all()
    assert np.isnan(found["gate"][2]).all() and np.isnan(found["gate"][:, 2]).all()
    assert np.isfinite(found["gate"][np.ix_([0, 1, 3], [0, 1, 3])]).all()
    assert np.isnan(found["k"][3, :3]).all()
    text = "\n".join(found.notes)
    assert "down: vectors of several lengths, compared within groups only: 0, 2, 3 (48); 1 (40)" in text
    assert "gate: layers [2] have no such matrix" in text
    assert "k: 0 and 3 are not compared, one has no vector that is not zero" in text
    assert found.chance["down"].shape == (4, 4)


def test_killed_and_resumed(tmp_path, monkeypatch):
    model = tiny_model("llama")
    expected = docs(model)
    calls = []
    compare = layer_map._compare

    def dies(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return compare(*args)

    monkeypatch.setattr(layer_map, "_compare", dies)
    with pytest.raises(KeyboardInterrupt):
        docs(model, resume=tmp_path / "rows")
    with next((tmp_path / "rows").iterdir()).open("a") as file:
        file.write('{"run": "cut o')  # the kill came while a line was being written
    found = docs(model, resume=tmp_path / "rows")
    assert len(calls) - 5 == 3 * 7 - 4  # three rows a kind; four were there
    for kind in expected.kinds:
        assert np.array_equal(found[kind], expected[kind])
    again = docs(model, resume=tmp_path / "rows")
    assert len(calls) - 5 == 3 * 7 - 4 and np.array_equal(again["up"], expected["up"])


@pytest.mark.parametrize("change", ["weights", "one value", "two rows", "axis", "layers"])
def test_rows_of_another_run_are_refused(tmp_path, change):
    model = tiny_model("llama")
    docs(model, kinds=["q"], resume=tmp_path)
    options = {"axis": {"axis": "in"}, "layers": {"layers": [0, 1]}}.get(change, {})
    if change == "weights":
        model.model.layers[2].self_attn.q_proj.weight.data[0, 0] += 1
    if change == "one value":  # in the middle, by the last bit
        weight = model.model.layers[2].self_attn.q_proj.weight.data
        weight[9, 13] = torch.nextafter(weight[9, 13], torch.tensor(9.0))
    if change == "two rows":
        weight = model.model.layers[2].self_attn.q_proj.weight.data
        weight[[3, 4], 5] = weight[[4, 3], 5]
    with pytest.raises(LayerProbeError, match="holds rows of another run"):
        docs(model, kinds=["q"], resume=tmp_path, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_weights_are_the_same_run(tmp_path, dtype):
    """However they lie in memory, and on any number of threads."""
    model, twin = (tiny_model("gpt2").to(dtype) for _ in range(2))
    docs(model, kinds=["up"], resume=tmp_path)
    for block in twin.transformer.h:
        block.mlp.c_fc.weight.data = block.mlp.c_fc.weight.data.T.contiguous().T
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    docs(twin, kinds=["up"], resume=tmp_path)
    torch.set_num_threads(threads)


SHARED = """
import json, sys
import torch
from torch import distributed
sys.path.insert(0, sys.argv[1])
from tiny import GQA, redrawn, tiny_model
from hf_layerprobe import docs
distributed.init_process_group("gloo")
found = docs(tiny_model("llama"))
json.dump({k: found[k].tolist() for k in found.kinds}, open(f"{sys.argv[2]}/{distributed.get_rank()}.json", "w"))
distributed.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path):
    (tmp_path / "run.py").write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29591"]
    tests = Path(__file__).parent
    subprocess.run([*command, tmp_path / "run.py", tests, tmp_path], check=True, timeout=300, capture_output=True)
    expected = docs(tiny_model("llama"))
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {kind: expected[kind].tolist() for kind in expected.kinds} == found


def test_a_process_that_starts_late_does_its_own_share(tmp_path, monkeypatch):
    """It finds the rows that the other one has saved by then; between them nothing is left out."""

    def stop(found):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer_map, "_gathered", stop)
    for rank in (0, 1):
        monkeypatch.setattr(layer_map, "_rank", lambda rank=rank: (rank, 2))
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(KeyboardInterrupt):
            docs(tiny_model("llama"), resume=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(layer_map, "_compare", lambda *_: pytest.fail("a row was left out"))
    assert np.isfinite(docs(tiny_model("llama"), resume=tmp_path)["q"]).all()


def test_the_work_is_shared_by_cost(monkeypatch):
    """One map costs far more than the others: by count one process would get most of the work."""
    blocks = [layer_map.Block("q", row, (0,), 1) for row in range(90)]
    blocks += [layer_map.Block("up", row, (0,), 100) for row in range(6)]
    shares = []
    for rank in range(3):
        monkeypatch.setattr(layer_map, "_rank", lambda rank=rank: (rank, 3))
        shares.append(layer_map._mine(blocks))
    assert sorted(b.key for share in shares for b in share) == sorted(b.key for b in blocks)
    costs = [sum(block.cost for block in share) for share in shares]
    assert max(costs) <= 1.02 * min(costs)


@pytest.mark.parametrize("sample", [None, 8])
def test_the_cost_is_said_before_starting(monkeypatch, sample):
    """Pairs, operations and time in the log; operations and time on the progress bar, which ends where it should."""
    said, bars = [], []
    bar = layer_map.progress
    monkeypatch.setattr(layer_map.logger, "info", said.append)
    monkeypatch.setattr(layer_map, "progress", lambda **options: bars.append(options) or bar(**options))
    docs(tiny_model("llama"), kinds=["q", "k"], sample=sample)
    vectors, few = {"q": 32, "k": 16}, sample or 0
    products = {"q": 2 * few * 32, "k": 2 * few * 16} if sample else {kind: m * m for kind, m in vectors.items()}
    operations = 2 * 6 * 32 * sum(products.values())
    assert said[-1].startswith(f"docs: 12 pairs of matrices, {operations * 1e-12:.3g} TFLOP of products, about ")
    assert " s at " in said[-1] and said[-1].endswith(" TFLOP/s on this process's threads")
    assert bars[0]["total"] == operations and bars[0]["desc"].startswith("DOCS (about 00:0")
    docs(tiny_model("llama"), kinds=["q"], index="cka")
    assert said[-1] == "cka: 6 pairs of matrices"  # no products of vectors, so nothing is said of time


def test_the_bar_counts_operations(monkeypatch):
    done = []

    class Bar:
        def __init__(self, **options):
            self.total = options["total"]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            assert sum(done) == self.total > 0

        def update(self, operations):
            done.append(operations)

    monkeypatch.setattr(layer_map, "progress", Bar)
    docs(tiny_model("llama"))
    assert len(done) == 3 * 7


def test_saved_and_loaded(tmp_path):
    found = docs(tiny_model("llama"), kinds=["q", "up"], sample=16)
    loaded = SimilarityMatrix.load(found.save(tmp_path / "maps.safetensors"))
    for kind in found.kinds:
        assert np.array_equal(loaded[kind], found[kind])
        assert np.array_equal(loaded.standard_error[kind], found.standard_error[kind])
    assert loaded.chance == found.chance and loaded.kinds == found.kinds
    assert (loaded.rows, loaded.axis, loaded.index, loaded.notes) == (found.rows, found.axis, found.index, found.notes)
    with pytest.raises(LayerProbeError, match="is not a saved SimilarityMatrix"):
        SimilarityMatrix.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("text")
    with pytest.raises(LayerProbeError, match="is not a saved SimilarityMatrix"):
        SimilarityMatrix.load(tmp_path / "text")


def test_names_tables_and_figures(tmp_path):
    found = docs(tiny_model("llama"), kinds=["q", "up"], layers=[1, 3])
    table = found.to_pandas()["up"]
    assert list(table.index) == list(table.columns) == ["1", "3"]
    assert table.loc["1", "3"] == found["up"][0, 1]
    assert [path.name for path in found.plot(tmp_path / "maps")] == ["docs_q.png", "docs_up.png"]
    assert json.loads(json.dumps(found.to_dict()))["rows"]["q"] == ["1", "3"]


def test_arithmetic():
    first, second = (docs(tiny_model("llama", seed), kinds=["q"]) for seed in (0, 1))
    np.testing.assert_allclose((first - second)["q"], first["q"] - second["q"])
    mean = (first + second) / 2
    np.testing.assert_allclose(mean["q"], (first["q"] + second["q"]) / 2)
    assert mean.chance["q"] == first.chance["q"]
    with pytest.raises(LayerProbeError, match="they differ in axis"):
        first - docs(tiny_model("llama"), kinds=["q"], axis="in")
    with pytest.raises(LayerProbeError, match="they differ in rows, columns"):
        first - docs(tiny_model("llama"), kinds=["q", "k"])


def test_per_layer_against_another_model():
    base, tuned = tiny_model("llama"), tiny_model("llama")
    tuned.model.layers[1].self_attn.q_proj.weight.data.normal_()
    assert (docs(base, other=tuned, kinds=["q"]).per_layer("q") < 0.9).tolist() == [False, True, False, False]
    regression = docs(base, other=tuned, kinds=["q"], index="regression")["q"]  # not symmetric, and all of it computed
    assert np.isfinite(regression).all()


def test_two_models_of_unlike_layers():
    """What cannot be compared is said, whichever of the two lacks it."""
    base, wide = tiny_model("llama"), redrawn(tf.LlamaForCausalLM(tf.LlamaConfig(**{**GQA, "hidden_size": 64})))
    found = docs(base, other=wide, kinds=["q", "o"])
    assert np.isnan(found["q"]).all() and np.isnan(found.excess("q")).all()
    layers = "0, 1, 2, 3"
    groups = f"{layers} of the first model (32); {layers} of the second model (64)"
    assert found.notes == tuple(f"{k}: vectors of several lengths, compared within groups only: {groups}" for k in "qo")

    dense = tiny_model("bert")
    for one, other, whose in ((base, dense, "first"), (dense, base, "second")):
        found = docs(one, other=other)
        assert found.kinds == ("q", "k", "v", "o", "up", "down") and np.isfinite(found["up"]).all()
        assert found.notes[0] == f"gate: only the {whose} model has such matrices"

    lacking = tiny_model("llama")
    lacking.model.layers[2].mlp = torch.nn.Identity()
    found = docs(base, other=lacking, kinds=["up"])
    assert np.isnan(found["up"][:, 2]).all() and np.isfinite(found["up"][:, [0, 1, 3]]).all()
    assert found.notes == ("up: layers [2] of the second model have no such matrix",)

    mlps, attentions = tiny_model("llama"), tiny_model("llama")
    for mlp, attention in zip(mlps.model.layers, attentions.model.layers, strict=True):
        mlp.self_attn = attention.mlp = torch.nn.Identity()
    with pytest.raises(LayerProbeError, match="in common: the first has gate, up, down, the second q, k, v, o"):
        docs(mlps, other=attentions)


@pytest.mark.parametrize("live", [True, False])
def test_a_model_with_its_head_against_one_without(live, tmp_path):
    """The stack has another path there."""
    model = tiny_model("llama")
    model.model.save_pretrained(tmp_path)
    bare = model.model if live else tmp_path
    assert (docs(model, other=bare, kinds=["q"]).per_layer("q") == 1).all()
    assert (docs(bare, other=model, kinds=["q"]).per_layer("q") == 1).all()
    with pytest.raises(LayerProbeError, match="layers"):  # the caller's path is that of both
        docs(model, other=bare, kinds=["q"], stack="model.layers")


def test_unknown_index():
    with pytest.raises(LayerProbeError, match="Unknown index 'cosine'; the indices are docs, regression"):
        docs(tiny_model("llama"), index="cosine")


def test_a_model_without_cross_layer_memory(smollm2):
    """The cache is bounded: reading again what does not fit gives the same numbers."""
    expected = docs(smollm2, kinds=["k"], layers=range(6))
    cache, units.CACHE = units.CACHE, 1
    try:
        assert np.array_equal(docs(smollm2, kinds=["k"], layers=range(6))["k"], expected["k"])
    finally:
        units.CACHE = cache


def test_architectures_with_unlike_layers():
    """A dense layer among MoE layers is compared as the MLP it is."""
    config = tf.Qwen3MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1],
    )  # fmt: skip
    model = tf.Qwen3MoeForCausalLM(config)
    found = docs(model, kinds=["up"])
    dense, mixture = (layer_matrices(model.model.layers[i], config)["up"] for i in (1, 2))
    assert dense.shape == (48, 32) and mixture.shape == (64, 32)
    assert found["up"][1, 2] == pytest.approx(docs_similarity(dense, mixture))
    assert found.chance["up"].shape == (3, 3)
