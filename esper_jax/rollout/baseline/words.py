"""A comparison with a baseline, and figures, as lines."""

from collections.abc import Mapping

from esper_jax.rollout.baseline.comparison import Comparison, Figures, Part

__all__ = ["compared", "figures_told"]


def figures_told(figures: Mapping[str, Figures], rows: int) -> list[str]:
    """The figures of one config's programs.

    Args:
      figures: by program.
      rows: of a batch.
    """
    lines = [_line("", "median", "p95", "p99", "memory", "compiled in")]
    for name, f in figures.items():
        memory, took = _bytes(f.memory), f"{f.compile_seconds:.2f} s"
        times = (_seconds(x) for x in (f.median, f.p95, f.p99))
        lines.append(_line(name, *times, memory, took))
    step = figures["step"]
    lines.append(f"{rows / step.median:,.0f} rows per second; {_clock(step.clock)}")
    return lines


def compared(comparison: Comparison, rows: int) -> list[str]:
    """A comparison: what differs, a table, what is told only, and the verdict."""
    lines = [
        f"config: {key} {was!r} -> {now!r}"
        for key, (was, now) in list(comparison.changes.items())[:8]
    ]
    lines += [
        f"{name}: {was!r} when the baseline was saved, {now!r} now; both programs run "
        "on the latter, so this difference is not seen"
        for name, (was, now) in comparison.unlike.items()
    ]
    lines.append(_line("", "baseline", "now", "ratio", "99% interval"))
    for part in comparison.parts:
        shown = _bytes if part.name.endswith("memory") else _seconds
        low, high = part.ratio.low, part.ratio.high
        interval = "exact" if low == high else f"[{low:.3f}, {high:.3f}]"
        both, ratio = (shown(part.baseline), shown(part.now)), f"{part.ratio.value:.3f}"
        lines.append(f"{_line(part.name, *both, ratio, interval)}  {part.verdict}")
    lines.append("not judged:")
    for name, old in comparison.baseline.items():
        new = comparison.now[name]
        for key in ("p95", "p99"):
            both = _seconds(getattr(old, key)), _seconds(getattr(new, key))
            lines.append(_line(f"{name} {key}", *both))
        times = (f"{f.compile_seconds:.2f} s" for f in (old, new))
        lines.append(_line(f"{name} compiled in", *times))
    speeds = (
        f"{rows / f['step'].median:,.0f}" for f in (comparison.baseline, comparison.now)
    )
    lines.append(_line("rows per second", *speeds))
    lines.append(_clock(comparison.now["step"].clock))
    return [*lines, *_verdict(comparison)]


def _verdict(comparison: Comparison) -> list[str]:
    most = f"the tolerance of {1 + comparison.tolerance:g}"
    if all(comparison.same.values()):
        return ["no regression: the programs are the same; what differs above is noise"]
    worse = [p for p in comparison.parts if p.verdict == "regression"]
    open_ = [p.name for p in comparison.parts if p.verdict == "not decided"]
    lines = [f"regression: {_ratio(part)}, beyond {most}" for part in worse]
    if open_:
        lines.append(
            f"not decided: {', '.join(open_)}: the interval holds {most}; more "
            "--rounds make it narrower"
        )
    return lines or [f"no regression beyond {most}"]


def _ratio(part: Part) -> str:
    low, high = part.ratio.low, part.ratio.high
    interval = "" if low == high else f" [{low:.3f}, {high:.3f}]"
    more = f"{part.ratio.value:.3f} times as"
    if part.name.endswith("memory"):
        return f"{part.name} is {more} large{interval}"
    return f"{part.name} takes {more} long{interval}"


def _clock(clock: str) -> str:
    if clock == "device":
        return "times are those of the device's kernels, by the profiler"
    return "times are wall clock, until the result is there"


def _line(name: str, *cells: str) -> str:
    return f"{name:<18}" + "  ".join(f"{cell:>15}" for cell in cells)


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3f} ms"


def _bytes(value: float) -> str:
    return f"{value / 2**20:.3f} MiB"
