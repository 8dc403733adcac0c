"""A start in the gradient's direction, for adapters with ``start="gradient"``.

While such a part is GERMINATED, ``W2`` is random, ``W1`` is 0 and collects its own
gradient. That is ``scaling * G W2^T`` with ``G``, (D, F), the gradient of the layer's
kernel: a random sketch of its columns (Halko, Martinsson, Tropp, arXiv:0909.4061),
which costs no pass over the host and works where the host is frozen. When the part
begins to train, ``W1`` becomes the left singular vectors of what its layer has
collected, and ``W2`` 0.
The correction is 0 throughout.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from esper_jax.blueprints.bank import Bank
from esper_jax.blueprints.kinds import Adapter, Blueprint
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import SeedState

__all__ = ["aim", "aiming", "aims", "collect", "collected"]


def aims(blueprints: Sequence[Blueprint]) -> bool:
    """Whether one of the blueprints starts in the gradient's direction."""
    return bool(_kinds(blueprints))


def aiming(state: SeedState, blueprints: Sequence[Blueprint]) -> Bool[Array, " K"]:
    """Slots of one layer that collect the gradient now."""
    owner = jnp.maximum(state.seed_of_slot, 0)
    newborn = (state.seed_of_slot >= 0) & (state.stage[owner] == Stage.GERMINATED)
    none = jnp.zeros_like(newborn)
    return sum((mine for _, mine in _apart(state, newborn, blueprints)), none)


def collect(
    bank: Bank,
    grads: Bank,
    where: Bool[Array, "*L K"],
    blueprints: Sequence[Blueprint],
) -> Bank:
    """The bank with a step's gradient added where slots collect it.

    Args:
      bank: of one layer or, with leading axes, of several.
      grads: of the step, in the same form.
      where: slots that collect.
      blueprints: the layer's blueprints.
    """
    custom = dict(bank.custom)
    for kind in _kinds(blueprints):
        old, more = custom[kind.name]["w1"], grads.custom[kind.name]["w1"]
        w1 = jnp.where(where[..., None, None], old - more, old)
        custom[kind.name] = {**custom[kind.name], "w1": w1}
    return dataclasses.replace(bank, custom=custom)


def collected(
    bank: Bank, state: SeedState, blueprints: Sequence[Blueprint]
) -> Float[Array, ""]:
    """Squared Frobenius norm of the gradient that a layer collected in a tick.

    An estimate from the sketches of its newborn parts, whose expectation over their
    random ``W2`` is exact. A part that has waited for ticks holds the sum over all of
    them, of which the mean is taken. NaN if none collects.

    Args:
      bank: of the layer.
      state: its seeds, before they grow older by this tick.
      blueprints: the layer's blueprints.
    """
    which = aiming(state, blueprints)
    waited = state.epochs_in_stage[jnp.maximum(state.seed_of_slot, 0)]
    ticks = waited.astype(jnp.float32) + 1
    total, columns = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    for kind, mine in _apart(state, which, blueprints):
        squares = jnp.sum(bank.custom[kind.name]["w1"] ** 2, axis=(-2, -1))
        squares /= ticks**2
        total += jnp.sum(jnp.where(mine, squares, 0)) / kind.scaling**2
        columns += kind.hidden * jnp.sum(mine).astype(jnp.float32)
    return jnp.where(columns > 0, total / jnp.maximum(columns, 1), jnp.nan)


def aim(
    bank: Bank,
    key: Key[Array, ""],
    state: SeedState,
    starts: Bool[Array, " K"],
    blueprints: Sequence[Blueprint],
) -> Bank:
    """The bank of one layer with the parts that begin to train in their direction.

    Parts that begin together share the singular vectors, kind after kind: the first
    gets those of the largest singular values. A part that has collected nothing gets a
    random ``W1``.

    Args:
      bank: holds what was collected.
      key: draws ``W1`` for parts that have no direction.
      state: the layer's seeds, before or after they move.
      starts: slots that begin to train.
      blueprints: the layer's blueprints.
    """
    custom = dict(bank.custom)
    apart = _apart(state, starts, blueprints)
    found: dict[str, Array] = {}
    for reads in ("input", "layer"):  # what reads something else has its own gradient
        some = [(kind, mine) for kind, mine in apart if kind.reads == reads]
        held = [(custom[kind.name]["w1"] / kind.scaling, mine) for kind, mine in some]
        names = [kind.name for kind, _ in some]
        found |= dict(zip(names, _directions(held) if held else [], strict=True))
    for i, (kind, mine) in enumerate(apart):
        old, own, w1 = custom[kind.name], jax.random.fold_in(key, i), found[kind.name]
        random = jax.random.normal(own, w1.shape) / math.sqrt(w1.shape[1])
        known = jnp.any(old["w1"] != 0, axis=(-2, -1), keepdims=True)
        w1 = jnp.where(known & jnp.isfinite(w1), w1, random)
        here = mine[:, None, None]
        custom[kind.name] = {
            **old,
            "w1": jnp.where(here, w1, old["w1"]),
            "w2": jnp.where(here, 0, old["w2"]),
        }
    return dataclasses.replace(bank, custom=custom)


def _directions(
    sketches: Sequence[tuple[Float[Array, "K D _"], Bool[Array, " K"]]],
) -> list[Float[Array, "K D _"]]:
    """Orthonormal columns for the slots chosen, by falling singular value.

    Args:
      sketches: of each kind, what its slots collected, and which are chosen.
    """
    flat = []
    for sketch, mine in sketches:
        own = jnp.swapaxes(jnp.where(mine[:, None, None], sketch, 0), 0, 1)
        flat.append(own.reshape(own.shape[0], -1))
    joined = jnp.concatenate(flat, axis=1)
    scale = jnp.max(jnp.abs(joined))
    u, _, _ = jnp.linalg.svd(
        joined / jnp.where(scale > 0, scale, 1), full_matrices=False
    )
    first, found = jnp.zeros((), jnp.int32), []
    for sketch, mine in sketches:
        hidden, order = sketch.shape[-1], jnp.cumsum(mine) - 1
        # Fewer directions than columns, if the input is narrow: begin again.
        column = first + order[:, None] * hidden + jnp.arange(hidden)[None]
        found.append(jnp.swapaxes(u[:, column % u.shape[1]], 0, 1))
        first += hidden * jnp.sum(mine)
    return found


def _kinds(blueprints: Sequence[Blueprint]) -> list[Adapter]:
    return [b for b in blueprints if isinstance(b, Adapter) and b.start == "gradient"]


def _apart(
    state: SeedState, where: Bool[Array, " K"], blueprints: Sequence[Blueprint]
) -> list[tuple[Adapter, Bool[Array, " K"]]]:
    """Each blueprint that aims, with the slots chosen that hold it."""
    owner = jnp.maximum(state.seed_of_slot, 0)
    kind = jnp.clip(state.blueprint[owner].astype(jnp.int32), 0, len(blueprints) - 1)
    return [(b, where & (kind == blueprints.index(b))) for b in _kinds(blueprints)]
