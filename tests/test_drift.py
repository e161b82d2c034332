"""DOCS in a bounded slice of time, and drift from a start."""

import numpy as np
import oracles
import pytest
import torch
from tiny import tiny_model

from hf_layerprobe import LayerProbeError, docs, docs_similarity, find_stacks
from hf_layerprobe.scores.bounded import TimeSlice, docs_of_pairs, spread
from hf_layerprobe.scores.drift import Start, drift, save_start, start_of
from hf_layerprobe.weights import LiveWeights

PAIRS = [(i, j) for i in range(4) for j in range(i + 1, 4)]


def weights(seed=0, family="llama"):
    return LiveWeights(find_stacks(tiny_model(family, seed))[0])


def test_pairs_are_those_of_the_map():
    found = docs_of_pairs(weights(), PAIRS, TimeSlice(None), sample=None)
    expected = docs(tiny_model("llama"))
    off_diagonal = ~np.eye(4, dtype=bool)
    for kind in expected.kinds:
        np.testing.assert_allclose(found.values[kind][off_diagonal], expected[kind][off_diagonal], atol=1e-9)
        np.testing.assert_allclose(found.excess[kind][off_diagonal], expected.excess(kind)[off_diagonal], atol=1e-9)
        assert np.isnan(np.diagonal(found.values[kind])).all()
    assert found.compared == found.wanted == 6 * 7


def test_a_slice_that_is_over_at_once_has_one_pair_of_matrices_and_always_the_same():
    first, second = (docs_of_pairs(weights(), PAIRS, TimeSlice(0), sample=None) for _ in range(2))
    assert (first.compared, first.wanted) == (1, 6 * 7)
    np.testing.assert_array_equal(first.values["q"], second.values["q"])
    assert np.isfinite(first.values["q"]).sum() == 2 and np.isnan(first.values["k"]).all()


def test_a_slice_ends_before_what_would_take_too_long(monkeypatch):
    """On a clock of its own: the last piece of a kind says what the next one takes."""
    now = [0.0]
    monkeypatch.setattr("hf_layerprobe.scores.bounded.time.perf_counter", lambda: now[0])
    cost = {"small": 1.0, "large": 3.0}

    def done(seconds, pieces, first=None):
        now[0], work = 0.0, []
        for number, kind in enumerate(TimeSlice(seconds).pieces((kind, kind) for kind in pieces)):
            now[0] += first if first and not number else cost[kind]
            work.append(kind)
        return len(work), now[0]

    both = ["small", "large"] * 5
    assert done(None, both) == (10, 20.0)
    assert done(11.0, both) == (5, 9.0)  # the third large one would end at 12
    assert done(12.0, both) == (6, 12.0)
    assert done(0.5, both) == (1, 1.0)
    assert done(5.0, ["large", "small"]) == (1, 3.0)  # nothing is known of small ones yet
    assert done(9.0, ["small"] * 9, first=4.0) == (6, 9.0)  # a slow start, such as a compilation, is no rule


def test_a_sample_is_close_and_repeats_itself():
    torch.manual_seed(0)
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = torch.nn.Parameter(torch.randn(600, 32))
    stack = LiveWeights(find_stacks(model)[0], ["up"])
    whole = docs_of_pairs(stack, PAIRS, TimeSlice(None), sample=None).values["up"]
    part, again = (docs_of_pairs(stack, PAIRS, TimeSlice(None), sample=200).values["up"] for _ in range(2))
    np.testing.assert_array_equal(part, again)
    assert 0 < np.nanmax(np.abs(part - whole)) < 0.02


def test_every_beginning_of_a_spread_is_spread():
    for number in (7, 29, 435):
        order = spread(range(number))
        assert sorted(order) == list(range(number))
        for length in range(3, number, 5):
            gaps = np.diff([-1, *sorted(order[:length]), number])
            assert gaps.max() <= 3 * number / length + 1


@pytest.mark.parametrize("sample", [None, 12])
def test_drift_is_what_its_definition_says(tmp_path, sample):
    before, after = weights(0), weights(0)
    with torch.no_grad():
        for layer, module in enumerate(after.stack.layers):
            for parameter in module.parameters():
                torch.manual_seed(layer)
                parameter += 0.1 * layer * torch.randn_like(parameter) * parameter.std()
    save_start(start_of(before, sample=sample), tmp_path / "start", step=3, sample=sample)
    start = Start(tmp_path / "start")
    assert (start.step, start.sample) == (3, sample)
    found, measured = drift(after, start, [0, 1, 2, 3], TimeSlice(None))
    assert measured == 4 * 7
    for kind in before.kinds:
        for layer in range(4):
            W0, W = (side.parts(layer, kind)[0].double().numpy() for side in (before, after))
            if sample is None:
                norm = np.linalg.norm(W - W0) / np.linalg.norm(W0)
                similarity = oracles.docs(W0, W) if layer else 1.0
            else:
                rows = np.sort(torch.randperm(len(W0), generator=torch.Generator().manual_seed(0))[:sample].numpy())
                norm = np.linalg.norm(W[rows] - W0[rows]) / np.linalg.norm(W0[rows])
                similarity = one_sided(W0[rows], W) if layer else 1.0
            assert found["norm"][kind][layer] == pytest.approx(norm, rel=1e-5)
            assert found["docs"][kind][layer] == pytest.approx(similarity, abs=1e-5)
    assert found["norm"]["q"][0] == 0 and found["docs"]["q"][0] == 1


def one_sided(X, Y):
    """Gumbel location of the best matches of X's rows in Y."""
    from scipy.stats import gumbel_r

    X, Y = (M / np.linalg.norm(M, axis=1, keepdims=True) for M in (X, Y))
    return gumbel_r.fit(np.abs(X @ Y.T).max(1))[0]


def test_the_whole_start_is_docs(tmp_path):
    save_start(start_of(weights(0), sample=None), tmp_path / "start", step=0, sample=None)
    found, _ = drift(weights(1), Start(tmp_path / "start"), [0, 1, 2, 3], TimeSlice(None))
    expected = docs_similarity(weights(0).parts(2, "gate")[0], weights(1).parts(2, "gate")[0])
    assert found["docs"]["gate"][2] == pytest.approx(expected, abs=1e-9)


def test_kept_layers_are_compared_with_their_own_start(tmp_path):
    save_start(start_of(weights(0), sample=None), tmp_path / "start", step=0, sample=None)
    model = tiny_model("llama")
    del model.model.layers[1]
    found, _ = drift(LiveWeights(find_stacks(model)[0]), Start(tmp_path / "start"), [0, 2, 3], TimeSlice(None))
    assert all((values == 0).all() for values in found["norm"].values())


def test_what_is_no_start_is_refused(tmp_path):
    with pytest.raises(LayerProbeError, match="has no weights to measure drift from"):
        Start(tmp_path / "nothing")
    (tmp_path / "other").write_bytes(b"not safetensors")
    with pytest.raises(LayerProbeError, match="has no weights to measure drift from"):
        Start(tmp_path / "other")
