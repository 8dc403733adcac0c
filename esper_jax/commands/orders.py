"""What ``esper-jax bus send`` can ask of a run."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

__all__ = ["Order"]

_Layer = Annotated[str, tyro.conf.arg(metavar="LAYER")]
_Seed = Annotated[int, tyro.conf.arg(metavar="N")]
_Name = Annotated[str | None, tyro.conf.arg(metavar="NAME")]


@dataclasses.dataclass(frozen=True)
class _Germinate:
    """Ask a dormant seed to germinate."""

    layer: _Layer
    """Name of the layer, such as layers/0."""
    seed: _Seed
    """Number of the seed."""
    blueprint: _Name = None
    """One of the layer's. Default: the first."""
    strategy: _Name = None
    """Grafting strategy. Default: the seed's own."""

    def command(self) -> Any:
        from esper_jax.bus import Germinate

        return Germinate(**vars(self))


@dataclasses.dataclass(frozen=True)
class _Move:
    """Ask a seed to go to another stage."""

    layer: _Layer
    """Name of the layer, such as layers/0."""
    seed: _Seed
    """Number of the seed."""
    stage: Annotated[str, tyro.conf.arg(metavar="STAGE")]
    """Such as CULLED."""

    def command(self) -> Any:
        from esper_jax.bus import Move

        return Move(**(vars(self) | {"stage": self.stage.upper()}))


@dataclasses.dataclass(frozen=True)
class _SetStrategy:
    """Give a seed another grafting strategy."""

    layer: _Layer
    """Name of the layer, such as layers/0."""
    seed: _Seed
    """Number of the seed."""
    strategy: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """Such as momentum."""

    def command(self) -> Any:
        from esper_jax.bus import SetStrategy

        return SetStrategy(**vars(self))


@dataclasses.dataclass(frozen=True)
class _Enable:
    """Let the policy's seeds germinate again."""

    def command(self) -> Any:
        from esper_jax.bus import Enable

        return Enable(on=True)


@dataclasses.dataclass(frozen=True)
class _Disable:
    """Let nothing germinate that the policy asks for. Living seeds go on."""

    def command(self) -> Any:
        from esper_jax.bus import Enable

        return Enable(on=False)


@dataclasses.dataclass(frozen=True)
class _Stop:
    """End the run after the tick, saved."""

    def command(self) -> Any:
        from esper_jax.bus import StopAndSave

        return StopAndSave()


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Several commands for seeds at one tick: all of them, or none.

    The file is a JSON list: [{"kind": "Move", "layer": "layers/0", "seed": 3, "stage":
    "CULLED"}, ...]
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Of JSON; - is standard input."""
    loose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Carry out what can be, whatever else is refused."""

    def command(self) -> Any:
        import msgspec

        from esper_jax.bus import Batch
        from esper_jax.run.config import ConfigError

        try:
            here = str(self.file) == "-"
            text = sys.stdin.read() if here else self.file.expanduser().read_text()
            wire = {"commands": json.loads(text), "atomic": not self.loose}
            return msgspec.convert(wire, Batch)
        except (OSError, ValueError, RecursionError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"batch {self.file}: expected a JSON list of commands ({why!s:.300})"
            ) from None


Order = (
    Annotated[_Germinate, tyro.conf.subcommand("germinate", prefix_name=False)]
    | Annotated[_Move, tyro.conf.subcommand("move", prefix_name=False)]
    | Annotated[_SetStrategy, tyro.conf.subcommand("set-strategy", prefix_name=False)]
    | Annotated[_Enable, tyro.conf.subcommand("enable", prefix_name=False)]
    | Annotated[_Disable, tyro.conf.subcommand("disable", prefix_name=False)]
    | Annotated[_Stop, tyro.conf.subcommand("stop", prefix_name=False)]
    | Annotated[_Batch, tyro.conf.subcommand("batch", prefix_name=False)]
)
"""A command by the word that sends it; ``command()`` makes it."""
