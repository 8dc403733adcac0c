"""Arrays on disk: Orbax writes them, TensorStore reads them.

Only this file knows Orbax, whose v1 API still moves. Orbax stores each array under its
name in one database (OCDBT). Reading from there, and not through Orbax, has the shape
and dtype of each array compared with the manifest before anything is decompressed.
"""

import contextlib
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as v0
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from esper_jax.checkpoint.location import plain
from esper_jax.checkpoint.manifest import Damaged, LeafRecord, first_line

__all__ = ["load", "save"]

_STATE = "state"

_CACHE = 100_000_000
"""Bytes that may hold the index of the database while it is read."""


def save(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays that have elements below ``folder``, in this process alone.

    Raises:
      Exception: whatever Orbax raises if it cannot write.
    """
    with plain(folder) as safe, _orbax():
        _check_writable(safe)
        if jax.process_count() == 1:
            ocp.save(safe / _STATE, dict(arrays))
            return
        # Orbax's v1 API would wait for all processes. The older one does not.
        own = jax.process_index()
        alone = v0.options.MultiprocessingOptions(
            primary_host=own,
            active_processes={own},
            barrier_sync_key_prefix=f"esper_jax-save-{own}",
        )
        handler = v0.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with v0.Checkpointer(handler, multiprocessing_options=alone) as writer:
            writer.save(safe / _STATE, dict(arrays))


def _check_writable(folder: Path) -> None:
    """Makes a folder and removes it.

    Where Orbax cannot make its own, its threads wait five minutes for it, the process
    cannot end before, and then they print their stacks.

    Raises:
      OSError: if that fails.
    """
    probe = folder / f"{_STATE}.probe"
    probe.mkdir()
    probe.rmdir()


def load(folder: Path, records: Mapping[str, LeafRecord]) -> dict[str, np.ndarray]:
    """Reads the arrays with these names, if each is stored as its record says.

    Takes as much memory as the records say, and a little for what is being decoded.

    Raises:
      Damaged: naming the first array that is missing, of another shape or dtype, or
        cannot be read.
    """
    if not records:
        return {}
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
    with plain(folder) as safe:
        base, driver = _database(safe)
        opening = {
            name: ts.open(_spec(base, name, driver), context=context, open=True)
            for name in records
        }
        stores = {name: _result(name, store) for name, store in opening.items()}
        for name, record in records.items():
            _check(name, stores[name], record)
        reading = {name: store.read() for name, store in stores.items()}
        return {name: np.asarray(_result(name, got)) for name, got in reading.items()}


def _database(folder: Path) -> tuple[Path, str]:
    """The database and its format: that of Orbax's v1 API, or of the older one."""
    state = folder / _STATE
    inner = state / _STATE
    return (inner, "zarr3") if inner.is_dir() else (state, "zarr")


def _spec(base: Path, name: str, driver: str) -> dict[str, Any]:
    return {
        "driver": driver,
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{base}/"},
            "path": name if name.endswith("/") else f"{name}/",
        },
    }


def _result(name: str, future: Any) -> Any:
    try:
        return future.result()
    except Exception as error:  # its kind depends on what is broken
        raise Damaged(
            f"leaf {name} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from None


def _check(name: str, store: Any, record: LeafRecord) -> None:
    """Refuses an array that is not stored as the manifest says, in one chunk or more.

    A chunk is decompressed as a whole, so it must not be larger than the array.
    """
    found = f"{store.dtype.numpy_dtype}{list(store.shape)}"
    if found != f"{record.dtype}{list(record.shape)}":
        raise Damaged(
            f"leaf {name} is stored as {found}, expected "
            f"{record.dtype}{list(record.shape)}"
        )
    chunk = store.chunk_layout.write_chunk.shape or ()
    if math.prod(chunk) > math.prod(record.shape):
        raise Damaged(f"leaf {name} is stored in chunks of {list(chunk)}, too large")


@contextlib.contextmanager
def _orbax() -> Iterator[None]:
    """Keeps Orbax to this process, whatever other processes do, and keeps it quiet.

    When Orbax fails it prints the stack of each of its threads. The error itself comes
    back as an exception.
    """

    def wanted(record: logging.LogRecord) -> bool:
        return "raised an exception" not in record.getMessage()

    own = jax.process_index()
    alone = ocp.Context()
    alone.multiprocessing.primary_host = own
    alone.multiprocessing.active_processes = {own}
    alone.multiprocessing.barrier_sync_key_prefix = f"esper_jax-{own}"
    logger = logging.getLogger("absl")
    logger.addFilter(wanted)
    _hush()
    try:
        with alone:
            yield
    finally:
        logger.removeFilter(wanted)


def _not_of_a_dropped_task(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not ("exception was never retrieved" in text and "orbax" in text)


def _hush() -> None:
    """From now on, prints no stacks of what Orbax leaves behind when a save fails.

    TensorStore goes on with the other arrays for a while, and tells an event loop that
    Orbax has closed. Its threads hand each refusal to `sys.unraisablehook`. Where it
    cannot make its folder, Orbax drops a coroutine, and Python warns of that. Where one
    array cannot be written, it drops the tasks of the others, and asyncio logs each.
    """
    logging.getLogger("asyncio").addFilter(_not_of_a_dropped_task)
    warnings.filterwarnings("ignore", "coroutine 'OrbaxLayout", RuntimeWarning)
    before = sys.unraisablehook
    if getattr(before, "hushes_orbax", False):
        return

    def hook(raised: "sys.UnraisableHookArgs") -> None:
        if raised.object is not None or str(raised.exc_value) != "Event loop is closed":
            before(raised)

    hook.hushes_orbax = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook
