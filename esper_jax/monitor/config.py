"""Which writers a run has: the table ``[monitor]`` of its config."""

import dataclasses

from esper_jax.monitor.prometheus import DEFAULT_PORT

__all__ = ["NEEDED", "MonitorConfig"]

NEEDED = {
    "jsonl": None,
    "tensorboard": ("tensorboardX", "esper-jax[tensorboard]"),
    "prometheus": ("prometheus_client", "esper-jax[prometheus]"),
    "wandb": ("wandb", "wandb"),
}
"""The writers by name: the module that each needs, and what pip is told to install."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Where a run publishes what its ticks say.

    Whether what a writer needs is installed is looked at before a run trains, not here:
    the config of a run can be read where its writers cannot.

    Args:
      writers: names, in `NEEDED`.
      port: that ``prometheus`` listens on; 0 for any that is free.
      address: that it listens on.
      project: of ``wandb``.
    """

    writers: tuple[str, ...] = ("jsonl",)
    port: int = DEFAULT_PORT
    address: str = "127.0.0.1"
    project: str = "esper-jax"

    def __post_init__(self) -> None:
        for number, name in enumerate(self.writers):
            if name not in NEEDED:
                raise ValueError(
                    f"writers[{number}] must be one of {', '.join(NEEDED)}; got "
                    f"{name!r:.80}"
                )
            if name in self.writers[:number]:
                raise ValueError(
                    f"writers[{number}] must not repeat an earlier one, got {name!r}"
                )
        if not 0 <= self.port < 2**16:
            raise ValueError(
                "port must be from 1 to 65535, or 0 for any that is free; got "
                f"{self.port}"
            )
        for name in ("address", "project"):
            value = getattr(self, name)
            if not value or value != value.strip():
                raise ValueError(
                    f"{name} must be a name without spaces around it, got {value!r:.80}"
                )
