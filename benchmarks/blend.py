"""What blend adds to a layer: time and memory, by implementation, on one GPU.

    PYTHONPATH=. python3 benchmarks/blend.py --out DIR          # all tables, 5 minutes
    PYTHONPATH=. python3 benchmarks/blend.py --errors           # errors, and no times
    PYTHONPATH=. python3 benchmarks/blend.py --adapters         # whole-layer blueprints
    PYTHONPATH=. python3 benchmarks/blend.py --tune --out DIR   # block sizes
    PYTHONPATH=. python3 benchmarks/blend.py --specs width_8 --grouped  # one question
    PYTHONPATH=. python3 benchmarks/blend.py --smoke            # tiny, on a CPU

Every time is a median over rounds of calls whose inputs rotate among sets that together
are larger than the cache. Every variant is first compared with the plain JAX reference
in float32 at full precision. All ratios are of one run.

``blend_times.py`` measures times and memory, ``blend_errors.py`` errors,
``blend_adapters.py`` adapters, and ``blend_tune.py`` finds block sizes.
"""

import argparse
import pathlib
from typing import Any

import jax
from blend_adapters import adapters_table
from blend_calls import SETS, Run
from blend_errors import errors_table
from blend_times import both_ways_table, forward_table, memory_table, small_table

from esper_jax.kernels.blend.arg_specs import ARG_SPECS, ArgSpec

WIDTHS = (64, 128, 16, 2, 8, 32, 4, 256, 512)


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Prints each table of the run."""
    for table in dict.fromkeys(row["table"] for row in rows):
        mine = [
            {k: v for k, v in row.items() if k != "table"}
            for row in rows
            if row["table"] == table
        ]
        if table == "tune":
            from blend_tune import best_of

            mine = best_of(mine)
        columns = list(dict.fromkeys(k for row in mine for k in row))
        text = [[str(row.get(c, "")) for c in columns] for row in mine]
        widths = [
            max(len(c), *(len(t[i]) for t in text)) for i, c in enumerate(columns)
        ]
        print(f"\n{table}")
        for line in [columns, ["-" * w for w in widths], *text]:
            print(" | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)))


def options_of() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="directory for details")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any device")
    parser.add_argument("--tune", action="store_true", help="sweep block sizes")
    parser.add_argument(
        "--errors", action="store_true", help="errors of every shape, and no times"
    )
    parser.add_argument(
        "--adapters", action="store_true", help="blueprints that write a whole layer"
    )
    parser.add_argument(
        "--specs",
        nargs="*",
        help="shapes to tune, or to time both ways and nothing else",
    )
    parser.add_argument(
        "--grouped",
        action="store_true",
        help="time --specs with slots that share tiles, whatever their width",
    )
    parser.add_argument("--budget", type=float, default=420, help="seconds to tune for")
    return parser


def all_tables(run: Run, specs: dict[str, ArgSpec]) -> None:
    """Everything that RESULTS.md shows."""
    both_ways_table(run, [specs["width_64"]], (0.0, 0.1, 0.5, 1.0), SETS)
    forward_table(run, specs["width_64"])
    memory_table(run, specs["width_64"])
    small_table(run, specs["small_batch"])
    errors_table(run, [s for n, s in specs.items() if "width" not in n])
    names = [f"width_{w}" for w in ((16,) if run.smoke else WIDTHS) if w != 64]
    both_ways_table(run, [specs[name] for name in names], (0.1, 1.0))


def main() -> None:
    """Runs what the command line asks for, and prints its tables."""
    parser = options_of()
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options.smoke, options.out, grouped=options.grouped)
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, jax {jax.__version__}, {len(jax.devices())} device(s)"
    )
    if device.platform != "gpu" and not run.smoke:
        parser.error("there is no GPU here; --smoke runs anywhere")
    specs = dict(ARG_SPECS)
    if run.smoke:
        specs = {name: spec.small() for name, spec in specs.items()}
    if options.tune:
        from blend_tune import tune

        names = options.specs or [f"width_{w}" for w in (64, 16, 128)]
        names = names[:1] if run.smoke else names
        tune(run, [specs[name] for name in names], options.budget)
    elif options.adapters:
        adapters_table(run)
    elif options.errors:
        errors_table(run, list(specs.values()))
    elif options.specs:
        both_ways_table(run, [specs[name] for name in options.specs], (0.1, 1.0))
    else:
        all_tables(run, specs)
    print_tables(run.rows)


if __name__ == "__main__":
    main()
