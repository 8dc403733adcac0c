"""Baselines: how fast a config's step and tick were, kept so that they can run again.

A baseline is a folder:

====================  ==============================================================
``baseline.json``     device, versions, sizes, the config and its hash, and figures
``step.*, tick.*``    both programs with their inputs; see `rollout.baseline.exported`
====================  ==============================================================

A comparison does not read the figures. It runs the saved programs again, in turns with
today's, on this machine and in this process.
"""

import dataclasses
import hashlib
import importlib.util
import json
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from esper_jax.rollout.baseline.comparison import Comparison, Figures, Part, judged
from esper_jax.rollout.baseline.exported import (
    Compiled,
    Exported,
    compiled,
    export_program,
    load,
    occupied,
)
from esper_jax.rollout.baseline.timing import Ratio, ratio_of, take_turns
from esper_jax.run.build import build_run, load_data
from esper_jax.run.changes import differing
from esper_jax.run.config import ConfigError, RunConfig, to_dict
from esper_jax.run.folder import RunError, read_json, write_json
from esper_jax.run.opening import check_data
from esper_jax.run.own import one_batch
from esper_jax.run.record import settings
from esper_jax.train.batches import is_iterable, stack

__all__ = [
    "Prepared",
    "check_name",
    "check_there",
    "compare",
    "measure",
    "prepare",
    "save",
]

_VERSION = 1
_OF_A_RUN = ("seed", "checkpoint", "compare", "governor", "monitor")
"""Keys and tables that change neither program."""

_PROGRAMS = ("step", "tick")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is measured of a config.

    Args:
      config: of the model and its data.
      programs: ``step`` and ``tick``, with a living seed in every slot.
      sizes: shapes of a batch and of the held-out data, and numbers of parameters.
    """

    config: RunConfig
    programs: Mapping[str, Exported]
    sizes: Mapping[str, Any]


def check_name(folder: Path, name: str) -> Path:
    """The folder of a baseline.

    Args:
      folder: of all baselines.
      name: of one.

    Raises:
      ConfigError: if the name is none for a folder.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(
            f"--save, --against: expected a name of letters, digits, '_', '-' and '.', "
            f"got {name!r:.80}. The folder is --dir's"
        )
    return folder / name


def check_there(folder: Path, wanted: bool) -> None:
    """Looks whether a baseline is there and can be read, before anything is compiled.

    Args:
      folder: of the baseline.
      wanted: whether it must be there, or must not be.

    Raises:
      RunError: saying what to do.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise RunError(
            "--save and --against need the package flatbuffers, which is not "
            "installed: pip install 'esper-jax[rollout]'"
        )
    if wanted:
        _read(folder)
    elif folder.exists() or folder.is_symlink():
        raise RunError(
            f"{folder} exists: choose another --save NAME, or remove that folder to "
            "replace the baseline"
        )
    else:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"{folder} cannot be written ({error.strerror}): choose another --dir"
            ) from None


def prepare(config: RunConfig) -> Prepared:
    """Exports the step and the tick of a config, with its own data.

    Raises:
      ConfigError: if the config cannot be run.
      RunError: if its programs cannot be exported.
    """
    data = load_data(config)
    check_data(config, data)
    program = build_run(config, data)
    state = program.init(jax.random.key(config.seed))
    batch = one_batch("train", data.train, config.train.batch_size)
    program.check("batch", batch, False)
    held_out = data.held_out
    if is_iterable(held_out):
        held_out = stack("held_out", held_out, program.check)
    full = occupied(state)
    return Prepared(
        config,
        {
            "step": export_program(program.step, full, batch),
            "tick": export_program(program.tick, full, held_out),
        },
        {
            "batch": _shapes(batch),
            "held_out": _shapes(held_out),
            "rows": max(np.shape(x)[0] for x in jax.tree.leaves(batch) if np.ndim(x)),
            "host_params": sum(int(np.size(p)) for p in state.params.values()),
            "slots": sum(s.capacity for s in state.seeds.values()),
        },
    )


def measure(prepared: Prepared, rounds: int) -> dict[str, Figures]:
    """Figures of a config's programs, by name."""
    found = {}
    for name in _PROGRAMS:
        ready = compiled(prepared.programs[name])
        times = take_turns(ready.replay, ready.replay, rounds)
        found[name] = _figures(
            ready, np.concatenate([times.first, times.second]), times.clock
        )
    return found


def save(prepared: Prepared, figures: Mapping[str, Figures], out: Path) -> None:
    """Writes a baseline, as a whole or not at all.

    Args:
      prepared: what was measured.
      figures: of `measure`.
      out: folder to make.

    Raises:
      RunError: if it exists, or cannot be written.
    """
    check_there(out, False)
    scratch = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for name in _PROGRAMS:
            prepared.programs[name].save(scratch / name)
        described = _described(prepared, figures)
        files = {path.name: _digest(path) for path in sorted(scratch.iterdir())}
        write_json(scratch / "baseline.json", described | {"files": files})
        scratch.rename(out)
    except OSError as error:
        raise RunError(
            f"{out} cannot be written ({error.strerror}): choose another --dir"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def compare(
    prepared: Prepared, saved: Path, *, tolerance: float, rounds: int
) -> Comparison:
    """Runs a baseline's programs in turns with today's.

    Time and memory are judged; what compiling takes is only told, as it is measured
    once. A time is a regression if even the low end of its interval is beyond the
    tolerance.

    Args:
      prepared: of today.
      saved: folder of the baseline.
      tolerance: by which today's may be worse, 0.1 for a tenth.
      rounds: turns of both.

    Raises:
      RunError: if there is no such baseline, or it cannot be compared: another device,
        other shapes of the data.
    """
    table = _read(saved)
    _check_comparable(prepared, table, saved)
    parts: list[Part] = []
    same, old_figures, new_figures = {}, {}, {}
    for name in _PROGRAMS:
        exported = load(saved / name), prepared.programs[name]
        old, new = map(compiled, exported)
        times = take_turns(old.replay, new.replay, rounds)
        same[name] = exported[0].text == exported[1].text
        old_figures[name] = _figures(old, times.first, times.clock)
        new_figures[name] = _figures(new, times.second, times.clock)
        both = old_figures[name].median, new_figures[name].median
        parts.append(judged(name, *both, ratio_of(times), tolerance, same[name]))
        if old.memory and new.memory:
            exact = Ratio(*[new.memory / old.memory] * 3)
            memory = f"{name} memory", float(old.memory), float(new.memory)
            parts.append(judged(*memory, exact, tolerance, same[name]))
    before, now = table["settings"], settings()
    return Comparison(
        tolerance=tolerance,
        parts=tuple(parts),
        same=same,
        baseline=old_figures,
        now=new_figures,
        changes=differing(table["config"], to_dict(prepared.config), _OF_A_RUN),
        unlike={
            key: (before[key], now[key])
            for key in sorted(before.keys() & now.keys())
            if before[key] != now[key]
        },
    )


def _figures(ready: Compiled, seconds: np.ndarray, clock: str) -> Figures:
    median, p95, p99 = np.quantile(seconds, (0.5, 0.95, 0.99)).tolist()
    return Figures(median, p95, p99, clock, ready.seconds, ready.memory)


def _shapes(tree: Any) -> list[str]:
    """Shape and dtype of each array."""
    return [
        f"{np.dtype(x.dtype).name}{list(np.shape(x))}" for x in jax.tree.leaves(tree)
    ]


def _described(prepared: Prepared, figures: Mapping[str, Figures]) -> dict[str, Any]:
    """What ``baseline.json`` holds."""
    config = to_dict(prepared.config)
    text = json.dumps(config, sort_keys=True)
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "version": _VERSION,
        "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": settings(),
        "sizes": dict(prepared.sizes),
        "config_hash": hashlib.sha256(text.encode()).hexdigest(),
        "config": config,
        "figures": {name: dataclasses.asdict(f) for name, f in figures.items()},
        "rows_per_second": prepared.sizes["rows"] / figures["step"].median,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
    }


def _read(saved: Path) -> dict[str, Any]:
    """``baseline.json``, as far as a comparison needs it."""
    path = saved / "baseline.json"
    if not path.exists():
        there = sorted(p.parent.name for p in saved.parent.glob("*/baseline.json"))
        raise RunError(
            f"{saved} holds no baseline; there is {', '.join(there) or 'none'} in "
            f"{saved.parent}. Save one with --save {saved.name}"
        )
    table = read_json(path)
    keys = ("settings", "sizes", "config", "files")
    if not isinstance(table, dict) or not all(
        isinstance(table.get(key), dict) for key in keys
    ):
        raise RunError(f"{path} is damaged: it has not the tables of a baseline")
    for name, digest in table["files"].items():
        if not (saved / name).is_file() or _digest(saved / name) != digest:
            raise RunError(
                f"{saved / name} is damaged or gone: put it back, or remove {saved} "
                "and save the baseline again from the code that it was of"
            )
    return table


def _digest(path: Path) -> str:
    """SHA-256 of a file. What a damaged program would do is better not tried."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_comparable(prepared: Prepared, table: Mapping[str, Any], out: Path) -> None:
    now = settings()
    for key in ("platform", "device", "jax_enable_x64"):
        was = table["settings"].get(key)
        if was != now[key]:
            raise RunError(
                f"{out} was saved with {key} {was!r}, and this is {now[key]!r}: they "
                "cannot be compared. Save a baseline here"
            )
    for key in ("batch", "held_out"):
        was, is_now = table["sizes"].get(key), prepared.sizes[key]
        if was != is_now:
            raise RunError(
                f"{out} was measured with {key.replace('_', '-')} data of "
                f"{', '.join(was or [])}, and this config has {', '.join(is_now)}: "
                "they cannot be compared. Take the same data and train.batch_size, or "
                "save another baseline"
            )
