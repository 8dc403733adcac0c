"""Pieces of HTML. Every text that comes from elsewhere goes through `text`."""

import html
import re
from collections.abc import Iterable, Sequence

__all__ = ["name", "number", "table", "text"]

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202d\u202e\ud800-\udfff\ufffe\uffff]"
)
"""Control characters and halves of characters, which no page can hold, and characters
that turn the direction of all that follows."""


def text(value: object) -> str:
    """Anything as text that stands in HTML or in an attribute for what it is."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", str(value)))


def name(value: object) -> str:
    """A name as an element whose direction of writing does not reach beyond it."""
    return f"<bdi>{text(value)}</bdi>"


def number(value: float | None, digits: int = 4) -> str:
    """A number for people, whole ones with thin spaces; "not measured" for None."""
    if value is None:
        return "not measured"
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e7):
        return f"{int(value):,}".replace(",", "\u202f").replace("-", "\u2212")
    return f"{value:.{digits}g}".replace("-", "\u2212")


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    numeric: Iterable[int] = (),
) -> str:
    """A table whose first column heads its rows.

    Args:
      caption: what it holds, as HTML; read out before it.
      head: of each column, as HTML.
      rows: cells of each row, as HTML.
      numeric: columns that are set to the right.
    """
    right = {n: ' class="n"' for n in numeric}
    kinds = [right.get(n, "") for n in range(len(head))]
    top = "".join(
        f'<th scope="col"{k}>{h}</th>' for h, k in zip(head, kinds, strict=True)
    )
    body = "".join(f"<tr>{_row(cells, kinds)}</tr>\n" for cells in rows)
    return (
        f'<div class="scroll"><table><caption>{caption}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def _row(cells: Sequence[str], kinds: Sequence[str]) -> str:
    first, *rest = cells
    return f'<th scope="row"{kinds[0]}>{first}</th>' + "".join(
        f"<td{kind}>{cell}</td>" for cell, kind in zip(rest, kinds[1:], strict=True)
    )
