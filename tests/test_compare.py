"""What a run is shown beside: a static twin, and a picture."""

import numpy as np
import pytest

from esper_jax.data import Dataset
from esper_jax.lifecycle.stages import Stage
from esper_jax.run.compare import train_static, twin
from esper_jax.run.config import parse_config


def make_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 6)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32)
    return Dataset((x[:48], y[:48]), (x[48:72], y[48:72]), (x[72:], y[72:]), 2)


CONFIG = parse_config(
    {
        "model": {"hidden": [6, 12]},
        "growth": {"num_seeds": 2, "capacity": 2},
        "train": {"ticks": 3, "batch_size": 16, "learning_rate": 1e-2},
    }
)


def test_the_twin_is_the_narrowest_that_has_as_many_parameters():
    data = make_data()
    # 7 a + (a + 1) b + (b + 1) 2 with (a, b) = (6, 12): 152.
    for wanted, widths in ((152, (6, 12)), (153, (6, 13)), (173, (7, 13))):
        got = twin(CONFIG, data, wanted).model.hidden
        size = 7 * got[0] + (got[0] + 1) * got[1] + 2 * (got[1] + 1)
        assert size >= wanted
        assert sum(got) <= sum(widths) + 1
    assert twin(CONFIG, data, 152).model.hidden == (6, 12)


@pytest.mark.slow
def test_the_twin_trains_and_nothing_grows():
    static = train_static(CONFIG, make_data(), 152)
    assert static["parameters"] == 152
    assert static["widths"] == [6, 12]
    assert len(static["history"]) == 3
    assert 0 <= static["accuracy"] <= 1


def test_a_picture_is_drawn(tmp_path, monkeypatch):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    from esper_jax.monitor import plot

    ticks = [{"tick": t, "accuracy": a} for t, a in ((1, 0.1), (2, None), (3, 0.6))]
    events = [
        {"tick": 1, "to": Stage.GERMINATED.name, "outcome": "OK"},
        {"tick": 3, "to": Stage.FOSSILIZED.name, "outcome": "OK"},
        {"tick": 3, "to": Stage.FOSSILIZED.name, "outcome": "OK"},
        {"tick": 3, "to": Stage.CULLED.name, "outcome": "GATE"},
    ]
    static = {"history": [0.2, 0.3, 0.4], "parameters": 7, "accuracy": 0.4}
    path = tmp_path / "accuracy.png"
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *args, **kw: (drawn.append(figure), save(figure, *args, **kw)),
    )
    plot.accuracy(path, ticks, events, static)
    assert path.read_bytes().startswith(b"\x89PNG")
    top, strip = drawn[0].axes
    grown, twin = top.get_lines()[:2]
    np.testing.assert_array_equal(grown.get_ydata(), [0.1, np.nan, 0.6])
    np.testing.assert_array_equal(twin.get_ydata(), [0.2, 0.3, 0.4])
    # Rows: germinated, grafted, kept, culled; what was refused did not happen.
    marks = [rows.get_offsets().tolist() for rows in strip.collections]
    assert marks == [[[1, 0]], [], [[3, 2]], []]
    assert [text.get_text() for text in strip.texts] == ["2"]
