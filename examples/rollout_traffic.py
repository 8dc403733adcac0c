"""Stands in for a service: its requests come from many models, by id.

    python examples/rollout_traffic.py 20000 canary/observations.jsonl --fault slow

A flag decides, by the id, whether a request is answered by what is new; how it went is
recorded for the canary. ``--fault`` is what is wrong with what is new.
"""

import argparse

import numpy as np

from esper_jax.rollout import FlagFile, Observer, decide

parser = argparse.ArgumentParser()
parser.add_argument("requests", type=int)
parser.add_argument("observations")
parser.add_argument("--fault", choices=["slow", "wrong", "raising", "nan"])
parser.add_argument("--flag", default="chunked_layers")
parser.add_argument("--file", default="configs/features.toml")
options = parser.parse_args()

flag = FlagFile(options.file).read()[options.flag]
rng = np.random.default_rng([options.requests, flag.rollout_percentage])
counts = {"candidate": 0, "baseline": 0}
with Observer(options.observations) as observer:
    for _ in range(options.requests):
        model_id = f"model-{rng.integers(10**9)}"
        new = decide(flag, model_id).on
        if not new and rng.random() > max(flag.rollout_percentage, 10) / 100:
            continue  # ten of the baseline for one of the candidate do
        fault = options.fault if new else None
        seconds = rng.lognormal(-3.0, 0.3) * (1.5 if fault == "slow" else 1.0)
        right = rng.random() < (0.8 if fault == "wrong" else 0.95)
        failed = rng.random() < (0.2 if fault == "raising" else 0.01)
        loss = np.nan if fault == "nan" and rng.random() < 0.1 else 1.0
        arm = "candidate" if new else "baseline"
        counts[arm] += 1
        if failed:
            observer.observe(arm, latency=seconds, error=True, model_id=model_id)
        else:
            observer.observe(
                arm,
                latency=seconds,
                error=False,
                accuracy=float(right),
                loss=loss,
                model_id=model_id,
            )
print(f"recorded {counts['candidate']} candidate, {counts['baseline']} baseline")
