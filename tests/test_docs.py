"""DOCS against its transcription, its invariances as properties, and its chance level against simulation."""

from itertools import combinations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gumbel_r
from tiny import FAMILIES, tiny_model

from hf_layerprobe import LayerProbeError, docs, docs_similarity, find_stacks, prune_layers
from hf_layerprobe.scores import chance_level
from hf_layerprobe.scores.gumbel import gumbel_fit
from hf_layerprobe.weights import read_matrices

SHAPES = st.tuples(st.integers(2, 40), st.integers(2, 40), st.integers(2, 24), st.integers(0, 10_000))


def pair(shape):
    """Two related matrices [m, n] and [p, n]."""
    m, p, n, seed = shape
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(m, n, generator=generator)
    Y = torch.randn(p, n, generator=generator) + 0.5 * X[torch.randint(m, (p,), generator=generator)]
    return X, Y, generator


def orthogonal(n, generator):
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator))
    return q * r.diagonal().sign()  # Haar


@pytest.mark.parametrize("axis", ["out", "in"])
def test_six_real_layers_match_the_transcription(smollm2, axis):
    """Every pair of 6 SmolLM2 layers, all seven kinds."""
    layers = [0, 1, 5, 14, 15, 29]
    matrices = {(i, kind): m.numpy() for i, kind, m in read_matrices(find_stacks(smollm2)[0]) if i in layers}
    found = docs(prune_layers(smollm2, keep=layers, verify=False), axis=axis)
    assert found.kinds == ("q", "k", "v", "o", "gate", "up", "down")
    for kind in found.kinds:
        assert (np.diagonal(found[kind]) == 1).all()
        assert np.array_equal(found[kind], found[kind].T)
        for a, b in combinations(range(6), 2):
            expected = oracles.docs(matrices[layers[a], kind], matrices[layers[b], kind], axis)
            assert found[kind][a, b] == pytest.approx(expected, abs=1e-5), (kind, layers[a], layers[b])


def test_two_matrices_match_the_transcription(smollm2):
    X, Y = (smollm2.model.layers[i].mlp.down_proj.weight for i in (3, 4))
    for axis in ("out", "in"):
        found = docs_similarity(X, Y, axis=axis)
        assert isinstance(found, float)
        assert found == pytest.approx(oracles.docs(X.detach().numpy(), Y.detach().numpy(), axis), abs=1e-5)


@given(SHAPES)
@settings(deadline=None, max_examples=40)
def test_random_matrices_match_the_transcription(shape):
    X, Y, _ = pair(shape)
    if min(len(X), len(Y)) < 4:  # SciPy's own search is not reliable on two or three values
        return
    assert docs_similarity(X, Y) == pytest.approx(min(1, oracles.docs(X.numpy(), Y.numpy())), abs=1e-4)


@given(SHAPES)
@settings(deadline=None, max_examples=40)
def test_invariances(shape):
    X, Y, generator = pair(shape)
    expected = docs_similarity(X, Y)
    order = torch.randperm(len(X), generator=generator)
    signs = torch.randint(0, 2, (len(X), 1), generator=generator) * 2.0 - 1
    scales = torch.rand(len(X), 1, generator=generator) * 10 + 0.1
    turn = orthogonal(X.shape[1], generator)
    close = dict(abs=2e-5)
    assert docs_similarity(X[order], Y) == pytest.approx(expected, **close)
    assert docs_similarity(X * signs, Y) == pytest.approx(expected, **close)
    assert docs_similarity(X * scales, Y) == pytest.approx(expected, **close)
    assert docs_similarity(X @ turn, Y @ turn) == pytest.approx(expected, **close)
    assert docs_similarity(Y, X) == pytest.approx(expected, **close)
    assert docs_similarity(X.T, Y.T, axis="in") == expected
    assert 0 <= expected <= 1


@given(SHAPES)
@settings(deadline=None, max_examples=40)
def test_a_matrix_is_itself_up_to_order_sign_and_scale(shape):
    X, _, generator = pair(shape)
    order = torch.randperm(len(X), generator=generator)
    signs = torch.randint(0, 2, (len(X), 1), generator=generator) * 2.0 - 1
    assert docs_similarity(X, X) == 1
    assert docs_similarity(X, (X * signs * 3)[order]) == 1


def test_haar_pairs_score_at_chance_and_permuted_ones_at_one():
    generator = torch.Generator().manual_seed(0)
    A, B = orthogonal(256, generator), orthogonal(256, generator)
    assert docs_similarity(A, B) == pytest.approx(chance_level(256, 256, 256), rel=0.03)
    assert docs_similarity(A, A[torch.randperm(256, generator=generator)]) == 1


@pytest.mark.parametrize(
    "m, p, n",
    [
        (256, 256, 256),
        (768, 768, 768),
        (1536, 1536, 576),
        (576, 576, 1536),
        (192, 576, 576),
        (64, 64, 64),
        (2048, 2048, 16),
    ],
)
def test_chance_level_agrees_with_simulation(m, p, n):
    generator = torch.Generator().manual_seed(1)
    found = [
        docs_similarity(torch.randn(m, n, generator=generator), torch.randn(p, n, generator=generator))
        for _ in range(4)
    ]
    assert chance_level(m, p, n) == pytest.approx(np.mean(found), rel=0.03)


def test_chance_levels_of_known_shapes():
    for (m, n), expected in {(4096, 4096): 0.057, (4096, 1024): 0.115, (768, 768): 0.116, (256, 256): 0.18}.items():
        assert chance_level(m, m, n) == pytest.approx(expected, abs=0.003)


@given(st.integers(2, 300), st.floats(-5, 5), st.floats(1e-4, 10), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_gumbel_location_maximises_the_likelihood(size, location, scale, seed):
    sample = gumbel_r.rvs(location, scale, size=size, random_state=seed)
    found = gumbel_fit(torch.tensor(sample))[0].item()
    # At the optimum u = -b ln mean e^(-s/b), so the profile likelihood over b has its top there.
    betas = np.std(sample) * np.geomspace(1e-2, 1e2, 2001)
    shifted = -sample[None] / betas[:, None]
    top = shifted.max(1)
    locations = -betas * (np.log(np.exp(shifted - top[:, None]).mean(1)) + top)
    likelihood = [gumbel_r.logpdf(sample, u, b).sum() for u, b in zip(locations, betas, strict=True)]
    best = int(np.argmax(likelihood))
    step = abs(locations[min(best + 1, 2000)] - locations[max(best - 1, 0)])
    assert found == pytest.approx(locations[best], abs=step + 1e-9)


def test_gumbel_location_agrees_with_scipy_on_real_weights(smollm2):
    X, Y = (torch.nn.functional.normalize(smollm2.model.layers[i].self_attn.q_proj.weight.detach()) for i in (7, 8))
    sample = (X @ Y.T).abs().amax(1)
    assert gumbel_fit(sample)[0].item() == pytest.approx(gumbel_r.fit(sample.double().numpy())[0], abs=1e-5)


def test_samples_without_spread():
    assert gumbel_fit(torch.full((5,), 0.25))[0].item() == 0.25
    assert gumbel_fit(torch.tensor([0.7]))[0].item() == pytest.approx(0.7)
    assert [part.shape for part in gumbel_fit(torch.tensor([[0.5, 0.5], [0.1, 0.4]]))] == [(2,), (2,)]


def test_zero_vectors_are_left_out():
    X, Y, _ = pair((20, 30, 8, 0))
    with_zeros = torch.cat([X[:5], torch.zeros(3, 8), X[5:]])
    assert docs_similarity(with_zeros, Y) == docs_similarity(X, Y)
    with pytest.raises(LayerProbeError, match="Y has no vector that is not zero"):
        docs_similarity(X, torch.zeros(3, 8))


def test_extreme_scales_do_not_overflow():
    X, Y, _ = pair((20, 20, 8, 0))
    assert docs_similarity(X * 1e30, Y * 1e-30) == pytest.approx(docs_similarity(X, Y), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    for stack in find_stacks(model := tiny_model(family)):
        for axis in ("out", "in"):
            found = docs(model, stack=stack, axis=axis)
            matrices = {(i, kind): m.numpy() for i, kind, m in read_matrices(stack)}
            for kind in found.kinds:
                assert found[kind].shape == (stack.num_layers, stack.num_layers)
                assert found[kind][0, 2] == pytest.approx(
                    oracles.docs(matrices[0, kind], matrices[2, kind], axis), abs=1e-5
                )
                assert 0 < found.chance[kind] < 1
                assert found.excess(kind)[0, 0] == 1


def test_two_models():
    base, tuned = tiny_model("llama"), tiny_model("llama")
    tuned.model.layers[1].self_attn.q_proj.weight.data.normal_()
    found = docs(base, other=tuned, kinds=["q", "k"])
    assert (np.diagonal(found["k"]) == 1).all()
    assert np.diagonal(found["q"])[[0, 2, 3]].tolist() == [1, 1, 1]
    assert found["q"][1, 1] < 0.9
    assert found["q"][0, 1] == pytest.approx(
        docs_similarity(base.model.layers[0].self_attn.q_proj.weight, tuned.model.layers[1].self_attn.q_proj.weight)
    )


def test_bfloat16_weights():
    model = tiny_model("llama")
    exact = docs(model, kinds=["q"])["q"]
    np.testing.assert_allclose(docs(model.to(torch.bfloat16), kinds=["q"])["q"], exact, atol=5e-3)


@pytest.mark.parametrize(
    "X, Y, message",
    [
        (torch.ones(3), torch.ones(3, 3), r"X is \(3,\)"),
        (torch.ones(3, 3), [[1.0]], "Y is list"),
        (torch.ones(3, 3), torch.ones(3, 4), "X has vectors of 3, Y of 4"),
        (torch.full((2, 2), float("nan")), torch.ones(2, 2), "X holds NaN"),
    ],
)
def test_unusable_matrices(X, Y, message):
    with pytest.raises(LayerProbeError, match=message):
        docs_similarity(X, Y)


def test_unknown_axis():
    for call in (
        lambda: docs_similarity(torch.eye(2), torch.eye(2), axis="rows"),
        lambda: docs(tiny_model("llama"), axis=0),
    ):
        with pytest.raises(LayerProbeError, match="axis is 'out'"):
            call()


def test_unknown_kind_of_a_result():
    with pytest.raises(KeyError, match="no kind 'gate' here; computed: q"):
        docs(tiny_model("llama"), kinds=["q"])["gate"]
