"""The page of a policy's training: curves over its generations."""

from collections.abc import Mapping, Sequence
from typing import Any

from esper_jax.markup import number, table
from esper_jax.monitor.page.document import document, folded
from esper_jax.monitor.page.panels import Curve, axis, panel
from esper_jax.monitor.page.records import finite, whole
from esper_jax.monitor.page.tables import keys

__all__ = ["training_page"]

_PANELS = (
    ("Score", (("reward", "the policy", "held"), ("baseline", "nothing", "static"))),
    ("Gain", (("gain", "policy less nothing, same runs", "held"),)),
    ("Births a run", (("births", "the policy", "held"),)),
    ("Parameters, over the host's", (("parameters", "the policy", "held"),)),
)
"""Title of each panel, and key, label and style of its curves."""

_COLUMNS = ("generation", "reward", "baseline", "gain", "gain_error", "births")


def training_page(
    title: str, rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> str:
    """One page of HTML that tells how a policy was trained.

    Args:
      title: name of the folder.
      rows: a line of ``metrics.jsonl`` for each generation; they may hold anything.
      config: of the training.
    """
    known = [(whole(row.get("generation")), row) for row in rows]
    numbered = [(n, row) for n, row in known if n is not None]
    last = max((n for n, _ in numbered), default=0)
    drawn = "".join(
        panel(
            heading,
            [
                Curve(label, style, [(n, finite(row.get(key))) for n, row in numbered])
                for key, label, style in curves
            ],
            last,
            unit="generation",
        )
        for heading, curves in _PANELS
    )
    numbers = (
        [number(finite(row.get(name))) for name in _COLUMNS] for _, row in numbered
    )
    listed = table("Generations", _COLUMNS, numbers, numeric=range(len(_COLUMNS)))
    sections = [
        (
            "curves",
            "Curves",
            f"{_NOTE}<div class='chart'>{drawn}{axis(last, 'generation')}</div>"
            + folded("The same as a table", listed),
        ),
        ("config", "Config", folded("Every key", keys("Config", config))),
    ]
    return document(
        title, f'<p class="status">{number(len(numbered))} generations</p>', sections
    )


_NOTE = (
    "<p>Each generation draws tasks of its own, so scores of two generations differ by "
    "chance as well. The gain compares runs of the same host on the same rows.</p>"
)
