"""A page of HTML from what a run wrote down. Reads records alone, and changes none."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from esper_jax.monitor.page import MARK, Records, page
from esper_jax.run.config import to_dict
from esper_jax.run.folder import RunError, RunFolder, read_config, read_json
from esper_jax.run.logs import read_logs
from esper_jax.run.record import read_record

__all__ = ["read_records", "report_run", "write_page"]


def report_run(out: Path, path: Path | None = None) -> Path:
    """Writes a report of the run in ``out``, whether or not it has ended.

    Args:
      out: folder of the run.
      path: of the page; by default ``report.html`` in that folder. An older report
        there is replaced, as a whole or not at all.

    Returns:
      The path of the page.

    Raises:
      RunError: if the folder holds no run, a record is damaged, or ``path`` is
        something else than a report, or cannot be written.
    """
    return write_page(page(read_records(RunFolder(out))), out, path)


def write_page(content: str, out: Path, path: Path | None = None) -> Path:
    """Writes a page where no other file is lost; returns its path.

    Args:
      content: the page.
      out: folder of what it tells of.
      path: as for `report_run`.

    Raises:
      RunError: as by `report_run`.
    """
    path = out / "report.html" if path is None else path
    _check_place(path)
    _write(path, content)
    return path


def read_records(folder: RunFolder) -> Records:
    """What a run wrote down, as far as it came.

    Raises:
      RunError: if the folder holds no run, or a record is damaged.
    """
    config, record = read_config(folder), read_record(folder)
    summary = _summary(folder)
    logs = read_logs(folder, spare=True)
    return Records(
        name=folder.path.resolve().name,
        config=json.loads(json.dumps(to_dict(config))),
        settings={} if record is None else record.settings,
        changes=() if record is None else record.changes,
        layers={} if record is None else record.layers,
        summary=summary,
        **logs,
    )


def _summary(folder: RunFolder) -> dict[str, Any]:
    if not folder.summary.exists():
        return {}
    found = read_json(folder.summary)
    if isinstance(found, dict):
        return found
    raise RunError(f"{folder.summary} is damaged: it is no JSON object; remove it")


def _check_place(path: Path) -> None:
    """Refuses to write where something else than a report is."""
    if not path.parent.is_dir():
        raise RunError(
            f"{path} cannot be written: {path.parent} is no folder; make it, or choose "
            "another --out"
        )
    if not path.exists() and not path.is_symlink():
        return
    try:
        with path.open("rb") as file:
            known = MARK.encode() in file.read(1000) if path.is_file() else False
    except OSError:
        known = False
    if not known:
        raise RunError(
            f"{path} exists and is no report: choose another --out, or remove it"
        )


def _write(path: Path, text: str) -> None:
    """Replaces a file as a whole or not at all."""
    content = text.encode("utf-8", "replace")
    scratch = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name[:80]}.", delete=False
        ) as file:
            scratch = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o666 & ~_umask())
        scratch.replace(path)
    except OSError as error:
        if scratch is not None:
            with contextlib.suppress(OSError):
                scratch.unlink()
        raise RunError(
            f"{path} cannot be written: {error.strerror}; make room, give permission, "
            "or choose another --out"
        ) from None


def _umask() -> int:
    """What the process takes from the permissions of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
