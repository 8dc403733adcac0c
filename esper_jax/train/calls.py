"""How a model is called with the inputs of a batch ``(x, y)``."""

import inspect
from typing import Any

import jax.numpy as jnp

__all__ = ["called"]

_INSTEAD = (
    "Give build objective=f instead, where f(model, batch) calls the model itself and "
    "returns the loss"
)


def called(model: Any, x: Any) -> Any:
    """The model's outputs for the inputs of a batch.

    It is called with ``x`` alone. If its signature takes more than that, a tuple gives
    one argument after the other and a dictionary gives them by name.

    Raises:
      ValueError: if the signature takes none of these; it names ``objective=``.
    """
    if not callable(model):
        raise ValueError(
            "model must be callable with the x of a batch (x, y); "
            f"{type(model).__name__} has no __call__. {_INSTEAD}"
        )
    signature = inspect.signature(model)
    if _binds(signature, x):
        return model(x)
    if isinstance(x, dict) and _binds(signature, **x):
        return model(**x)
    if isinstance(x, tuple | list) and _binds(signature, *x):
        return model(*x)
    rngs = signature.parameters.get("rngs")
    if rngs is not None and rngs.default is rngs.empty:
        raise ValueError(
            "model must be callable with the x of a batch (x, y) alone, but its call "
            f"needs rngs; its signature is {signature}. Keep the nnx.Rngs in the model "
            f"(self.rngs), where they are part of the state. {_INSTEAD}"
        )
    raise ValueError(
        "model must be callable with the x of a batch (x, y); its signature is "
        f"{signature}, and x is {_described(x)}. {_INSTEAD}"
    )


def _described(x: Any) -> str:
    if isinstance(x, tuple | list | dict):
        return f"a {type(x).__name__} of {len(x)}"
    return f"an array of shape {jnp.shape(x)}"


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
