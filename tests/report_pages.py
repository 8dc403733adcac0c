"""Records of runs that never were, for tests of the report."""

import json
from pathlib import Path

from esper_jax.monitor.page.records import Records
from esper_jax.run.config import RunConfig, to_dict

CONFIG = json.loads(json.dumps(to_dict(RunConfig())))

STAGES = (
    "GERMINATED",
    "TRAINING",
    "GRAFTING",
    "STABILIZATION",
    "EVALUATING",
    "FINE_TUNING",
    "FOSSILIZED",
)


def nothing() -> Records:
    """Of a run that was killed before its first tick."""
    return Records(name="nothing", config=CONFIG)


def _event(tick, layer, seed, to, outcome="OK", text=""):
    return {
        "tick": tick,
        "layer": layer,
        "seed": seed,
        "slot": seed,
        "from": "DORMANT",
        "to": to,
        "outcome": outcome,
        "measured": {},
        "text": text or f"seed {seed}: to {to}",
    }


def hostile() -> Records:
    """Names that are HTML, quotes, other scripts, control characters, halves."""
    layers = (
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "'></title></style></details><iframe>",
        "層/0 🌱",
        "\u202eabc\u0000\ud800\u2028",
    )
    nan = float("nan")
    return Records(
        name="<b onload=alert(1)>run</b> \ud800",
        config={"a<b>": {"</code>": "<script>"}, "growth": {"blueprints": ["<i>"]}},
        settings={"<u>": "<img src=x>"},
        changes=[{"key": "<k>", "from": "<f>", "to": "<t>", "tick": 2}],
        layers={"<x>": {"features": 8, "num_seeds": 2, "blueprints": ["</svg>"]}},
        ticks=[
            {"tick": t, "loss": loss, "accuracy": a, "train_loss": float("inf")}
            for t, loss, a in ((1, 2.0, 0.1), (2, nan, nan), (3, None, 1), (4, 1e30, 0))
        ]
        + [
            {
                "tick": 5,
                "loss": 1,
                "seeds": {layers[0]: {"seed": [0, "x"], "alpha": [nan]}},
            }
        ],
        events=[
            *(
                _event(n, layer, 0, stage, text="<script>alert(2)</script>")
                for layer in layers
                for n, stage in enumerate(STAGES[:4], 1)
            ),
            _event(3, layers[0], 0, "<svg onload=alert(3)>", "<RULE>"),
        ],
        rollbacks=[{"number": 1, "tick": 2, "text": "<script>alert(4)</script>"}],
        summary={"controller": "<script>", "incomplete": ["<p>"], "static": 3},
    )


def many_seeds(count: int) -> Records:
    """A life of as many seeds in one layer, each through all stages."""
    return Records(
        name="many",
        config=CONFIG,
        layers={
            "wide": {"features": count, "num_seeds": count, "blueprints": ["residual"]}
        },
        ticks=[
            {"tick": t, "loss": 1 / t, "accuracy": 1 - 1 / t, "train_loss": 2 / t}
            for t in range(1, 501)
        ],
        events=[
            _event(10 * n + seed % 400, "wide", seed, stage)
            for seed in range(count)
            for n, stage in enumerate(STAGES, 1)
        ],
    )


def written(out: Path, records: Records) -> Path:
    """Writes records as a run does; returns the folder."""
    out.mkdir()
    (out / "config.json").write_text(json.dumps(records.config))
    for name in ("ticks", "events"):
        lines = "".join(json.dumps(e) + "\n" for e in getattr(records, name))
        (out / f"{name}.jsonl").write_text(lines)
    return out
