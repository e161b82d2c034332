"""The compiled search: how it is had, that torch steps in where it cannot be had, and what it finds.

What it finds can only be tested where it can be had; elsewhere the same tests run on what steps in, through
`best_matches`, so that no test is left out and none depends on the machine.
"""

import shutil
import subprocess
import sys

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_matching import assert_close, exact, made

from hf_layerprobe import docs_similarity
from hf_layerprobe.scores import matching, native
from hf_layerprobe.scores.vectors import Vectors


def matches(X, Ys):
    """The compiled search whatever the sizes; `best_matches` where there is none."""
    if native.kernel() is None:
        return matching.best_matches(X, Ys)
    return native.matches(X.packed, [Y.packed for Y in Ys])


SIZES = st.tuples(st.integers(1, 600), st.integers(1, 600), st.integers(1, 700), st.integers(0, 1000))


@given(SIZES, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.sampled_from(["out", "in"]))
@settings(deadline=None, max_examples=40)
def test_odd_shapes(shape, dtype, axis):
    """Also one vector, one coordinate, and vectors of zeros, which are left out."""
    X, Y = (m.to(dtype) for m in made(*shape))
    kept = X, Y
    if len(X) > 2:
        X = torch.cat([X[:1], torch.zeros_like(X[:2]), X[1:]])
    vectors = [Vectors.of(m if axis == "out" else m.T.contiguous(), axis) for m in (X, Y)]
    (found,) = matches(vectors[0], [vectors[1]])
    for values, expected in zip(found, exact(*kept), strict=True):
        values = values.double().numpy()
        assert (values <= expected + 1e-6).all()
        # Nearly the best: rounding to bfloat16 moves a cosine by no more than 2^-8.
        assert (values >= expected - 8e-3).all()


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("m, p, n", [(1, 40, 20_000), (530, 270, 1), (260, 33, 14_400)])
def test_extreme_shapes(m, p, n, axis):
    X, Y = made(m, p, n)
    vectors = [Vectors.of(a if axis == "out" else a.T.contiguous(), axis) for a in (X, Y)]
    assert_close(matches(vectors[0], [vectors[1]])[0], X, Y, exactly=n == 1)


@given(st.integers(128, 400), st.integers(128, 400), st.integers(128, 400), st.integers(0, 1000), st.floats(0, 3))
@settings(deadline=None, max_examples=12)
def test_the_index_is_that_of_the_transcription(m, p, n, seed, related):
    X, Y = made(m, p, n, seed)
    Y += related * X[torch.randint(m, (p,), generator=torch.Generator().manual_seed(seed))]
    assert docs_similarity(X, Y) == pytest.approx(oracles.docs(X.numpy(), Y.numpy()), abs=1e-5)


def test_products_that_are_all_zero():
    """Vectors that share no coordinate: padding must not be taken for a partner."""
    X, Y = torch.zeros(130, 260), torch.zeros(133, 260)
    X[:, :130], Y[:, 130:] = torch.eye(130), torch.randn(133, 130)
    (found,) = matches(Vectors.of(X, "out"), [Vectors.of(Y, "out")])
    assert [len(values) for values in found] == [130, 133]
    assert all((values == 0).all() for values in found)


def test_the_number_of_threads_changes_nothing():
    X, Y = made(700, 900, 333)
    _, Z = made(1, 200, 333, seed=1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            X_, *Ys = (Vectors.of(m, "out") for m in (X, Y, Z))
            found.append([values for pair in matches(X_, Ys) for values in pair])
    finally:
        torch.set_num_threads(before)
    if native.kernel() is not None:  # torch promises no such thing
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert all(torch.allclose(a, b, atol=1e-3) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, a processor that has it all, and a compiler if the machine has one; nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_LAYERPROBE_NATIVE", raising=False)
    monkeypatch.setattr(native, "_processor", lambda: set(native.NEEDED))
    native.kernel.cache_clear()
    yield tmp_path
    native.kernel.cache_clear()


@pytest.fixture
def compiled(fresh, monkeypatch):
    """The calls of a compiler that gives what no machine loads: these tests are about how it is kept."""
    source = fresh / "source.c"
    source.write_text("int nothing;")
    monkeypatch.setattr(native, "SOURCES", [source])
    compiled = []

    def compiler(path):
        compiled.append(path)
        return b"library" * 100

    monkeypatch.setattr(native, "_compiled", compiler)
    monkeypatch.setattr(native.shutil, "which", lambda name: sys.executable)
    return compiled


def cached(fresh):
    return sorted((fresh / "cache" / "hf_layerprobe").iterdir())


def test_compiled_once_and_kept(compiled, fresh):
    assert native._library() == native._library() == cached(fresh)[0]
    assert len(compiled) == 1 and len(cached(fresh)) == 1
    native.SOURCES[0].write_text("int changed;")
    assert native._library() in cached(fresh) and len(compiled) == 2 and len(cached(fresh)) == 2


@pytest.mark.parametrize(
    "damage", [lambda b: b[:50], lambda b: b"", lambda b: b[:9] + b"x" + b[10:], lambda b: b + b"x"]
)
def test_a_damaged_library_is_made_again(compiled, fresh, damage):
    path = native._library()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert native._library() == path and path.read_bytes() == whole and len(compiled) == 2


@pytest.mark.parametrize(
    "cause, reason",
    [
        ("environment", "HF_LAYERPROBE_NATIVE is 0"),
        ("processor", "no Linux on a processor with amx_tile"),
        ("compiler", "there is no C compiler"),
        ("failing compiler", "does not compile partners_check.c"),
        ("folder", "cache"),
        ("library", "partners-"),
    ],
)
def test_without_it_torch_steps_in(fresh, monkeypatch, cause, reason):
    if cause == "environment":
        monkeypatch.setenv("HF_LAYERPROBE_NATIVE", "0")
    elif cause == "processor":
        monkeypatch.setattr(native, "_processor", lambda: set(native.NEEDED) - {"amx_tile"})
    elif cause == "compiler":
        monkeypatch.setenv("PATH", str(fresh))
    elif cause == "failing compiler":
        fails = fresh / "cc"
        fails.write_text("#!/bin/sh\nexit 1\n")
        fails.chmod(0o755)
        monkeypatch.setenv("CC", str(fails))
    elif cause == "folder":
        (fresh / "cache").write_text("a file where the folder should be")
        monkeypatch.setattr(native, "_compiled", lambda compiler: b"never loaded")
        monkeypatch.setattr(native.shutil, "which", lambda name: sys.executable)
    else:
        monkeypatch.setattr(native, "_compiled", lambda compiler: b"not a library")
        monkeypatch.setattr(native.shutil, "which", lambda name: sys.executable)
    said = []
    monkeypatch.setattr(native.logger, "info", said.append)
    X, Y = made(200, 150, 140)
    assert native.kernel() is None and reason in said[0]
    (found,) = matching.best_matches(Vectors.of(X, "out"), [Vectors.of(Y, "out")])
    assert_close(found, X, Y, exactly=False)


def test_what_a_processor_can_do_is_asked_of_linux(monkeypatch):
    monkeypatch.setattr(native.Path, "read_text", lambda *_, **__: "flags\t: fma amx_tile\nflags\t: other\n")
    assert native._processor() == {"fma", "amx_tile"}

    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(native.Path, "read_text", missing)
    assert native._processor() == set()


def test_the_source_is_part_of_the_package():
    assert all(source.is_file() and source.parent.name == "scores" for source in native.SOURCES)


def test_it_is_had_where_it_can_be(tmp_path, monkeypatch):
    """On Linux with AMX and a compiler that knows it, compiled anew; elsewhere it says that it cannot be had."""
    compiler = next((path for name in native.COMPILERS if (path := shutil.which(name))), None)
    (tmp_path / "empty.c").write_text("int nothing;")
    command = [compiler or "", *native.FLAGS, str(tmp_path / "empty.c"), "-o", str(tmp_path / "empty.so")]
    knows = compiler is not None and subprocess.run(command, capture_output=True).returncode == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("HF_LAYERPROBE_NATIVE", raising=False)
    native.kernel.cache_clear()
    try:
        assert (native.kernel() is not None) == (knows and set(native.NEEDED) <= native._processor())
    finally:
        native.kernel.cache_clear()
