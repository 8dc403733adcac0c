"""The features that flags switch: what each does, and where it takes effect.

`Features` is the table. A run's config holds it as ``[features]``, with what the flags
said when the run began, so that the run goes on under the same features. All take
effect where a model or a run is made, none in the training step.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from esper_jax.layers.bed import SeedBed, check_incubation
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.stages import Stage
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.heuristic import heuristic
from esper_jax.policy.interface import PolicyFactory, idle

__all__ = ["Features", "apply_features", "policy_under"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """What a model may use. Features only take away: the defaults change nothing.

    Args:
      chunked_layers: layers that can grow run their seeds. If False, they run the base
        layer alone, and the seeds stay as they are.
      fused_kernels: layers take the fastest kernels for the platform, or those that
        they name. If False, they take plain JAX.
      growth: seeds germinate. If False, none does; living seeds go on.
      incubation: a seed in TRAINING learns as its layer says, by default straight
        through from the task. If False, it learns to reconstruct its chunk.
      grafting_strategies: name of the `Strategy` in lower case that seeds are grafted
        with; ``""`` for those that the layers name.
      performance_monitoring: a run writes metrics and profiles as it is told to. If
        False, it writes neither.
      ab_testing: ``esper-jax ab`` may compare the config with another.

    Raises:
      ValueError: if ``grafting_strategies`` is no strategy.
    """

    chunked_layers: bool = True
    fused_kernels: bool = True
    growth: bool = True
    incubation: bool = True
    grafting_strategies: str = ""
    performance_monitoring: bool = True
    ab_testing: bool = True

    def __post_init__(self) -> None:
        strategies = [strategy.name.lower() for strategy in Strategy]
        if self.grafting_strategies not in ("", *strategies):
            raise ValueError(
                f"grafting_strategies must be one of {', '.join(strategies)}, or empty "
                f"for those that the layers name; got {self.grafting_strategies!r:.80}"
            )

    def __str__(self) -> str:
        given = dataclasses.asdict(self)
        said = [f"{name} off" for name, value in given.items() if value is False]
        said += [f"{n} {v}" for n, v in given.items() if isinstance(v, str) and v]
        return ", ".join(said) or "all on"


def apply_features(model: nnx.Module, features: Features) -> None:
    """Takes from a model what its features leave out, in place.

    Call it after the model is made, or between steps: a function that was compiled for
    the model compiles once more if something changes. The features ``chunked_layers``,
    ``fused_kernels``, ``incubation`` and ``grafting_strategies`` take effect here;
    ``growth`` has its place in the policy (`policy_under`).

    Args:
      model: holds `ChunkedLayer` or `SeedBed` modules.
      features: of the model.

    Raises:
      ValueError: naming the layer that cannot be as the features say. Nothing has been
        changed then.
    """
    nodes = list(nnx.iter_graph(model))
    beds = {"/".join(map(str, p)): n for p, n in nodes if isinstance(n, SeedBed)}
    layers = [node for _, node in nodes if isinstance(node, ChunkedLayer)]
    held = {id(layer.bed) for layer in layers}
    for name, bed in beds.items():
        if not features.chunked_layers and id(bed) not in held:
            raise ValueError(
                f"chunked_layers must be on for {name!r}, a SeedBed without a layer "
                "that would be left: hold it in a ChunkedLayer"
            )
        if not features.incubation:
            try:
                check_incubation("reconstruction", bed.blueprints)
            except ValueError as error:
                raise ValueError(
                    f"incubation must be on for {name!r}: {error}"
                ) from None
    if not features.chunked_layers:
        for layer in layers:
            layer.enabled = False
    for bed in beds.values():
        if not features.fused_kernels:
            bed.implementation = "xla"
        if not features.incubation:
            bed.incubation = "reconstruction"
        if features.grafting_strategies:
            _graft_with(bed, Strategy[features.grafting_strategies.upper()])


def _graft_with(bed: SeedBed, strategy: Strategy) -> None:
    """Gives a strategy to the seeds that are not grafted yet."""
    seeds = bed.seeds.get_value()
    early = (seeds.stage < Stage.GRAFTING) | (seeds.stage > Stage.FOSSILIZED)
    new = jnp.where(early, jnp.asarray(strategy, seeds.strategy.dtype), seeds.strategy)
    bed.seeds.set_value(dataclasses.replace(seeds, strategy=new))


def policy_under(features: Features, config: ControllerConfig) -> PolicyFactory:
    """The heuristic under features, for ``policy=`` of `build` and `Growth`.

    Without ``growth`` nothing germinates. Without ``chunked_layers`` no seed changes
    its stage either: it counts for nothing while layers are plain, and would be judged
    by that.
    """
    on = features.growth and features.chunked_layers
    policy = heuristic(dataclasses.replace(config, enabled=config.enabled and on))
    return policy if features.chunked_layers else idle(policy)
