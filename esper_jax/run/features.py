"""The features that flags switch: what each does, and how a model is given them.

`Features` is the table. A run's config holds it as ``[features]``, with what a flag
file said when the run began, so that the run goes on under the same features. Each
takes effect where a model or a run is made, and none in the training step.
"""

import dataclasses

from esper_jax.lifecycle.grafting import Strategy

__all__ = ["Features"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """What a model may use. The defaults change nothing.

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
