"""Entries of streams, out of what redis-py returns in RESP 2 and 3."""

from typing import Any

__all__ = ["entries_of", "in_order", "streams_of"]


def entries_of(found: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """The entries of one stream, as XREADGROUP returns them in RESP 2 and 3."""
    if not found:
        return []
    if isinstance(found, dict):
        [batches] = found.values()
        return [entry for batch in batches for entry in batch]
    [(_, entries)] = found
    return list(entries)


def in_order(found: list[tuple[str, Any]], count: int) -> list[tuple[str, bytes, Any]]:
    """Stream, id and fields of entries in the order in which the server took them.

    Behind the last of a stream that has more than was read, nothing is given: what it
    has yet to give may come before.

    Args:
      found: entries by stream.
      count: how many of each were asked for.
    """

    def place(id: bytes) -> tuple[int, int]:
        milliseconds, _, number = id.partition(b"-")
        return int(milliseconds), int(number)

    lasts = [place(of[-1][0]) for _, of in found if len(of) >= count]
    merged = [(key, id, fields) for key, of in found for id, fields in of]
    merged.sort(key=lambda entry: place(entry[1]))
    return [e for e in merged if not lasts or place(e[1]) <= min(lasts)]


def streams_of(found: Any) -> list[tuple[str, Any]]:
    """Entries by stream, as XREAD returns them in RESP 2 and 3."""
    if not found:
        return []
    pairs = found.items() if isinstance(found, dict) else found
    flat = isinstance(found, dict)
    return [
        (key.decode(), [e for batch in of for e in batch] if flat else of)
        for key, of in pairs
    ]
