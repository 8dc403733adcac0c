"""``esper-jax policy``: trains learned policies, and tells what a file of one is."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from esper_jax.commands.base import Errand

__all__ = ["LearnedPolicy", "ShowPolicy", "TrainPolicy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainPolicy:
    """Train a learned policy as a config file describes.

    Whole runs on small tasks, thousands side by side. Needs a large GPU for more than a
    look. Where the folder holds a training that was begun, it goes on.
    """

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """TOML file of the training, such as configs/policy.toml."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for metrics.jsonl, the state to go on from, and policy.safetensors."""
    minutes: Annotated[float, tyro.conf.arg(metavar="M")] = float("inf")
    """After so many, compiling included, no further generation begins."""
    set: Annotated[
        tuple[tuple[str, ...], ...],
        tyro.conf.arg(metavar="KEY=VALUE ..."),
        tyro.conf.UseAppendAction,
    ] = ()
    """Override config values, for example evolution.generations=20."""

    def act(self) -> None:
        """Trains; prints a line of each generation."""
        from esper_jax.learning.config import load_policy_config
        from esper_jax.learning.train import train_policy

        overrides = [override for group in self.set for override in group]
        config = load_policy_config(self.config, overrides)
        command = shlex.join(["esper-jax", *sys.argv[1:]])
        out = self.out.expanduser()
        path = train_policy(config, out, minutes=self.minutes, command=command)
        print(f'{path}: policy = "learned" and learned.path = "{path}" use it')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowPolicy:
    """Print what made a policy: its command, seed, versions and hash.

    Of the folder of a training, also its curves.
    """

    path: Annotated[Path | None, tyro.conf.Positional] = None
    """File of a policy, or folder of a training. Default: the shipped policy."""

    def act(self) -> None:
        """Prints a line for each thing known."""
        from esper_jax.policy.learned_file import SHIPPED, read_policy

        path = (self.path or SHIPPED).expanduser()
        if path.is_dir():
            from esper_jax.learning.train import curves_of

            print("\n".join(curves_of(path)))
            path = path / "policy.safetensors"
        found = read_policy(path)
        print(path)
        for name, value in found.made_by.items():
            print(f"  {name}: {value}")
        print(f"  weights: {sum(w.size for w in found.weights.values())}")


@dataclasses.dataclass(frozen=True)
class LearnedPolicy(Errand):
    """Train a learned policy, or show what made one."""

    action: Annotated[
        Annotated[TrainPolicy, tyro.conf.subcommand("train")]
        | Annotated[ShowPolicy, tyro.conf.subcommand("show")],
        tyro.conf.arg(name=""),
    ]

    def only_reads(self) -> bool:
        return isinstance(self.action, ShowPolicy)

    def act(self) -> int:
        self.action.act()
        return 0
