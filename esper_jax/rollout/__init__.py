"""Safe rollout: is another configuration better, and is this code still as fast?"""

__all__: list[str] = []
