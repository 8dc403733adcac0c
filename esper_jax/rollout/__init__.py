"""Safe rollout: what decides, outside of jit, which models get what is new."""

__all__: list[str] = []
