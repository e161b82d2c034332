"""Figures: written whole, as pictures, from what the library hands on."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from tiny import tiny_model

from hf_layerprobe import LayerProbeError, LayerScores, SimilarityMatrix, docs
from hf_layerprobe.report import depth_plot, difference_plot, figures, heat_map, loss_curve, overview
from hf_layerprobe.report.figures import _draw_map, _draw_scores, _highest, _off_diagonal
from hf_layerprobe.scores.combined import combined
from hf_layerprobe.scores.registry import SCORES
from hf_layerprobe.search import Curve


def scores(name="influence", values=(3.0, 1.0, 2.0, 4.0), higher=True, source="a paper"):
    return LayerScores(name, np.array(values), higher, "model.layers", source)


@pytest.fixture(scope="module")
def similarity():
    return docs(tiny_model("llama"))


def test_every_figure_is_a_picture_with_something_on_it(similarity, tmp_path):
    several = [scores(), scores("avss-relative", (1e-3, 5.0, 80.0, 900.0), source="our own definition")]
    paths = [
        heat_map(similarity, "q", tmp_path / "new" / "q.png"),
        depth_plot(several, tmp_path / "depth.png"),
        overview(similarity, several, tmp_path / "overview.png"),
    ]
    for path in paths:
        picture = imread(path)
        assert min(picture.shape[:2]) > 300
        assert picture[..., :3].std() > 0.05
    assert sorted(p.name for p in tmp_path.iterdir()) == ["depth.png", "new", "overview.png"]  # no temporary file left


def test_an_unknown_kind_is_refused_and_an_older_figure_stays(similarity, tmp_path):
    path = tmp_path / "map.png"
    path.write_bytes(b"older")
    with pytest.raises(KeyError, match="computed: q"):
        heat_map(similarity, "w", path)
    assert path.read_bytes() == b"older"


def test_the_diagonal_is_left_out_of_a_model_with_itself_only():
    own = np.array([[1.0, 0.2], [0.2, 1.0]])
    assert np.isnan(np.diagonal(_off_diagonal(own))).all()
    assert own[0, 0] == 1  # the given values are not changed
    with_another = np.array([[0.9, 0.2], [0.2, 0.8]])
    assert np.array_equal(_off_diagonal(with_another), with_another)


def test_the_colour_scale_goes_from_chance_to_the_highest_but_does_not_blow_up_noise():
    for highest, expected in ((0.7, 0.7), (0.301, 0.35), (np.nan, 0.35)):
        values = np.array([[np.nan, highest], [0.2, np.nan]])
        image = _draw_map(Figure().add_subplot(), values, low=0.3, high=_highest(values, 0.3))
        assert image.get_clim() == pytest.approx((0.3, expected))


def test_a_figure_of_maps_with_holes(tmp_path):
    holes = np.full((3, 3), np.nan)
    holes[:2, :2] = [[1.0, 0.4], [0.4, 1.0]]  # the last layer lacks the matrix
    names = {"q": ["0", "1", "2"]}
    similarity = SimilarityMatrix({"q": holes}, {"q": 0.1}, "out", "layers", "paper", "docs", names, names)
    assert imread(heat_map(similarity, "q", tmp_path / "q.png"))[..., :3].std() > 0.05


@pytest.mark.parametrize(("higher", "weakest"), [(True, [1]), (False, [3])])
def test_the_least_important_quarter_is_marked(higher, weakest):
    axes = Figure().add_subplot()
    _draw_scores(axes, scores(higher=higher))
    assert axes.lines[1].get_xdata().tolist() == weakest
    assert axes.yaxis_inverted() == (not higher)  # the weakest is always at the bottom


def test_values_of_many_sizes_get_a_log_scale():
    scales = []
    for values in ((1.0, 2.0, 3.0, 4.0), (1e-3, 1.0, 50.0, 1e4), (-1.0, 1.0, 50.0, 1e4)):
        axes = Figure().add_subplot()
        _draw_scores(axes, scores(values=values))
        scales.append(axes.get_yscale())
    assert scales == ["linear", "log", "linear"]


def test_a_figure_of_another_index_and_of_some_layers(tmp_path):
    """No chance level to start the scale at, and the layers keep their numbers."""
    similarity = docs(tiny_model("llama"), kinds=["q"], index="cka", layers=[1, 3])
    assert imread(heat_map(similarity, "q", tmp_path / "q.png"))[..., :3].std() > 0.05


@pytest.mark.parametrize("make", [lambda model: docs(model, index="cka"), lambda model: docs(model) - docs(model)])
def test_an_overview_is_of_docs_above_chance(make, tmp_path):
    with pytest.raises(LayerProbeError, match="DOCS above chance, and got the index"):
        overview(make(tiny_model("llama")), [scores()], tmp_path / "overview.png")


def limits(similarity, monkeypatch, tmp_path):
    """The ends of the colour scale of the map of q, its title and the label of its colours."""
    drawn = []
    monkeypatch.setattr(figures, "_write", lambda figure, path: drawn.append(figure))
    heat_map(similarity, "q", tmp_path / "q.png")
    axes, bar = drawn[0].axes
    return axes.images[0].get_clim(), axes.get_title(), bar.get_ylabel()


def test_an_index_without_a_scale_of_its_own_is_not_one_flat_colour(monkeypatch, tmp_path):
    """HSIC of ordinary weights is about 1e-5."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 0.01
    similarity = docs(model, kinds=["q"], index="hsic")
    (low, high), title, _ = limits(similarity, monkeypatch, tmp_path)
    assert (low, high) == (similarity["q"].min(), similarity["q"].max()) and high < 1e-3
    assert "neighbours 0.000" not in title


@pytest.mark.parametrize("index", ["docs", "cka", "hsic"])
def test_differences_are_drawn_around_zero(index, monkeypatch, tmp_path):
    one, other = (docs(tiny_model("llama", seed), kinds=["q"], index=index) for seed in (0, 1))
    other.values["q"][0, 1] += 0.3  # so that the difference is mostly below zero
    (low, high), title, label = limits(one - other, monkeypatch, tmp_path)
    assert high == -low == pytest.approx(max(np.abs((one - other)["q"]).max(), 0.05 if index != "hsic" else 0))
    assert title.startswith(f"{index.upper()} difference of q") and "chance" not in title
    assert label == f"{index} difference"
    (low, high), *_ = limits(one - one, monkeypatch, tmp_path)
    assert high == -low
    assert "chance" in limits(one + one, monkeypatch, tmp_path)[1] or index != "docs"


def answers(path):
    """Of a large model, on many pairs."""
    found = scores("eavss", np.arange(1.0, 101), source="our own definition, after EAVSS, arXiv 2411.10069")
    found.data = {"pairs": 10_000, "confidence": 0.95}
    found.details = {name: found.values for name in ("variance_difference", "low", "high")}
    found.details["covers_zero"] = np.zeros(100)
    return difference_plot(found, path)


def every_score(path):
    """Under the source that each has, under that of a variation, and two of them combined."""
    sources = [(name, score.source) for name, score in SCORES.items()]
    sources += [(name, f"our own definition, after {source}") for name, source in sources if "our own" not in source]
    parts = (scores(name, source=SCORES[name].source) for name in ("docs", "avss-relative"))
    return depth_plot([*(scores(name, source=source) for name, source in sources), combined(*parts)], path)


def losses(path):
    """Of a hundred layers, every number of two digits before the point."""
    curve = Curve(tuple(range(101)), (*np.linspace(10, 10.5, 61), *np.linspace(11, 90, 40)), ((),) * 101)
    assert curve.knee >= 10
    return loss_curve(curve, path)


def kinds(path):
    return heat_map(docs(tiny_model("llama")), "down", path)


@pytest.mark.parametrize("draw", [answers, every_score, losses, kinds])
def test_no_title_is_cut(draw, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures, "_write", lambda figure, path: drawn.append(figure))
    draw(tmp_path / "figure.png")
    figure = drawn[0]
    figure.draw_without_rendering()
    titles = {axes.get_title(loc) for axes in figure.axes for loc in ("left", "center")} - {""}
    texts = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text() in titles)
    assert titles and {text.get_text() for text in texts} == titles
    for text in texts:
        place = text.get_window_extent()
        assert min(place.x0, place.y0) >= 0 and place.x1 <= figure.bbox.x1 and place.y1 <= figure.bbox.y1, text
