"""What notebooks and terminals show of models that grow, and of ticks."""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from browser import CHROMIUM, browser
from flax import nnx

from esper_jax import ChunkedLayer, make_growable
from esper_jax.growth import Growth, display
from esper_jax.growth.reports import seeds_in_report
from esper_jax.growth.showing import shown
from esper_jax.lifecycle.stages import Stage


class Net(nnx.Module):
    def __init__(self, rngs):
        self.trunk = nnx.Linear(4, 8, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.trunk(x)))


@pytest.fixture
def model():
    """Of its four seeds one is kept, one is being grafted, and one was culled."""
    model = Net(nnx.Rngs(0))
    make_growable(model, "trunk", num_seeds=4, rngs=nnx.Rngs(1))
    seeds = model.trunk.bed.seeds.get_value()
    model.trunk.bed.seeds.set_value(
        dataclasses.replace(
            seeds,
            stage=jnp.asarray(
                [Stage.FOSSILIZED, Stage.GRAFTING, Stage.DORMANT, Stage.CULLED],
                jnp.int8,
            ),
            slot_of_seed=jnp.asarray([0, 1, -1, -1], jnp.int32),
            worth=jnp.asarray([0.0123, jnp.nan, jnp.nan, jnp.nan]),
            graft=dataclasses.replace(
                seeds.graft, alpha=jnp.asarray([0, 0.25, 0, 0], jnp.float32)
            ),
        )
    )
    return model


WORDS = """\
trunk: 1 DORMANT, 1 GRAFTING, 1 FOSSILIZED, 1 CULLED
  seed 0: FOSSILIZED, residual_mlp, alpha 1, worth 0.0123
  seed 1: GRAFTING, residual_mlp, alpha 0.25, worth not measured
"""


def test_a_terminal_gets_lines(model, capsys):
    display(model)
    assert capsys.readouterr().out == WORDS
    Growth(model, optax.sgd(0.1)).display(model)
    assert capsys.readouterr().out == WORDS
    display(model.trunk)
    assert capsys.readouterr().out == WORDS.replace("trunk", "layer")
    display(model.trunk.bed)
    assert capsys.readouterr().out == WORDS.replace("trunk", "layer")


def cells(html):
    table = html.split("<tbody>")[1].split("</tbody>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [
        [re.sub("<.*?>", "", c) for c in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)]
        for row in rows
    ]


ROWS = [
    ["0", "FOSSILIZED", "residual_mlp", "1", "0.0123"],
    ["1", "GRAFTING", "residual_mlp", "0.25", "not measured"],
]


def test_a_notebook_gets_a_table_and_the_tree_of_treescope(model, monkeypatch):
    html = shown(model)._repr_html_()
    assert cells(html) == ROWS
    assert "treescope" in html
    monkeypatch.setitem(sys.modules, "treescope", None)  # as if it were not installed
    plain = shown(model)._repr_html_()
    assert cells(plain) == ROWS
    assert "treescope" not in plain
    assert model.trunk._repr_html_() == model.trunk.bed._repr_html_()
    assert cells(model.trunk._repr_html_()) == ROWS


def test_ipython_shows_the_html(model):
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell.instance()
    try:
        shell.user_ns |= {"display": display, "model": model}
        with capture_output() as captured:
            shell.run_cell("display(model)", store_history=False)
        [output] = captured.outputs
        assert cells(output.data["text/html"]) == ROWS
        assert output.data["text/plain"] == WORDS.rstrip()
    finally:
        InteractiveShell.clear_instance()


def test_a_report_shows_its_tick_and_the_seeds_after_it(model, capsys):
    report = Growth(model, optax.sgd(0.1)).tick(model, lambda _: (0.5, 0.75))
    html = report._repr_html_()
    assert "<b>tick 1</b>, step 0 · train loss not measured" in html
    assert "held-out loss 0.5 · accuracy 0.75" in html
    assert [row[:4] for row in cells(html)] == [
        ["0", "FOSSILIZED", "blueprint 0", "1"],
        ["1", "GRAFTING", "blueprint 0", "0.27"],
    ]
    display(report)
    assert capsys.readouterr().out.startswith("trunk: 1 DORMANT, 1 GRAFTING")
    many = jax.tree.map(lambda x: np.stack([x, x]), report)
    assert "reports of (2,) ticks" in many._repr_html_()

    @jax.jit
    def traced(report):
        assert "being traced" in report._repr_html_()
        assert seeds_in_report(report) == []
        return report.loss

    traced(report)


def test_a_stack_is_shown_layer_by_layer_and_shapes_are_no_seeds(capsys):
    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def made(rngs):
                return ChunkedLayer(nnx.Linear(4, 4, rngs=rngs), 2, rngs=rngs)

            self.layers = made(rngs)

    stack = Stack(nnx.Rngs(0))
    display(stack)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"layers[{n}]: 2 DORMANT" for n in range(3)]
    shapes = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    make = nnx.eval_shape(lambda: Stack(nnx.Rngs(0)))
    assert "no seeds whose values are known" in make.layers._repr_html_()
    with pytest.raises(ValueError, match="holds shapes only"):
        display(make)
    with pytest.raises(ValueError, match="at least one ChunkedLayer or SeedBed"):
        display(shapes)
    with pytest.raises(TypeError, match=r"what must be a model .* got dict"):
        display({})


def test_another_model_is_refused(model):
    with pytest.raises(ValueError, match="the one that Growth was made for"):
        Growth(model, optax.sgd(0.1)).display(Net(nnx.Rngs(0)))


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium is installed: no notebook's HTML was opened"
)
def test_it_renders_in_a_browser(model, tmp_path):
    path = tmp_path / "cell.html"
    html = shown(model)._repr_html_()
    path.write_text(f'<!doctype html><meta charset="utf-8">{html}', encoding="utf-8")
    with browser() as tab:
        tab.open(path)
        assert tab.errors == []
        assert [url for url in tab.requests if not url.startswith("data:")] == [
            path.as_uri()
        ]
        colours = tab.run(
            "[...document.querySelectorAll('[aria-label^=seed]')]"
            ".map(e => [e.getAttribute('aria-label'), e.getBoundingClientRect().width,"
            " getComputedStyle(e).backgroundColor])"
        )
        assert [c[0] for c in colours] == [
            "seed 0: FOSSILIZED",
            "seed 1: GRAFTING",
            "seed 2: DORMANT",
            "seed 3: CULLED",
        ]
        assert all(width > 10 for _, width, _ in colours)
        assert colours[0][2] == "rgb(0, 158, 115)"
        # treescope unpacks its tree by a script of its own.
        tab.wait("document.querySelector('treescope-container').shadowRoot")
