"""Models that grow, and reports of ticks, as notebooks and terminals show them."""

import sys
import warnings
from collections.abc import Callable

import jax
from flax import nnx

from esper_jax.growth.beds import find_beds
from esper_jax.growth.parts import values_of
from esper_jax.growth.reports import TickReport, seeds_in_report
from esper_jax.layers.bed import SeedBed
from esper_jax.layers.shown import LayerSeeds, html_of, seeds_in, words_of

__all__ = ["Shown", "display", "shown"]


class Shown:
    """What `display` shows: HTML in a notebook, lines elsewhere.

    Args:
      seeds: by layer.
      html: makes the HTML, where it is asked for.
    """

    def __init__(self, seeds: list[LayerSeeds], html: Callable[[], str]) -> None:
        self._seeds, self._html = seeds, html

    def _repr_html_(self) -> str:
        return self._html()

    def __repr__(self) -> str:
        return words_of(self._seeds)


def display(what: nnx.Module | TickReport) -> None:
    """Shows the layers that can grow, with their seeds by stage, alpha and worth.

    In a notebook as HTML, and for a model with its tree as treescope draws it, if that
    is installed; elsewhere it prints lines.

    Args:
      what: a model that can grow, or the report of a tick.

    Raises:
      TypeError: if it is neither.
      ValueError: if the model holds nothing that can grow, or shapes alone.
    """
    found = shown(what)
    notebook = sys.modules.get("IPython")
    if notebook is not None and notebook.get_ipython() is not None:
        from IPython.display import display as show

        show(found)
    else:
        print(found)


def shown(what: nnx.Module | TickReport) -> Shown:
    """What `display` shows, and raises."""
    if isinstance(what, TickReport):
        return Shown(seeds_in_report(what), what._repr_html_)
    if isinstance(what, SeedBed):
        return Shown(what.shown(), what._repr_html_)
    if not isinstance(what, nnx.Module):
        raise TypeError(
            "what must be a model that can grow or the TickReport of a tick; got "
            f"{type(what).__name__}"
        )
    seeds = _seeds_of(what)
    return Shown(seeds, lambda: html_of(seeds) + _tree(what))


def _seeds_of(model: nnx.Module) -> list[LayerSeeds]:
    """The seeds of a model, by layer; a stack's after each other."""
    beds, _, kinds = find_beds(model)
    values = values_of(model)
    return [
        entry
        for name, bed in beds.items()
        for entry in seeds_in(
            name,
            jax.tree.map(lambda x, bed=bed: x[bed.index], bed.read(values, "seeds")),
            [kind.name for kind in kinds[name]],
        )
    ]


def _tree(model: nnx.Module) -> str:
    """The model as treescope draws it; nothing without treescope."""
    try:
        import treescope
    except ImportError:
        return ""
    with warnings.catch_warnings():
        # Of numpy's, for what treescope looks at; nobody who displays can mend it.
        warnings.simplefilter("ignore", DeprecationWarning)
        tree = treescope.render_to_html(model, ignore_exceptions=True)
    return f'<div style="overflow-x:auto">{tree}</div>'
