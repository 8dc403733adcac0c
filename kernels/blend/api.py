"""The entry point of blend: validates once, then dispatches."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from esper_jax.blueprints import Bank, Blueprint, Custom, init_bank
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend import reference, sharded, triton
from esper_jax.kernels.blend.sharded import check_sharding
from esper_jax.lifecycle.signals import Statistics
from esper_jax.lifecycle.stages import Incubation
from esper_jax.parallel import collectives

__all__ = ["IMPLEMENTATIONS", "blend", "check_implementation"]


class _Implementation(NamedTuple):
    platforms: tuple[str, ...] | None
    """Where an automatic choice may take it; None is anywhere."""
    refusal: Callable[..., str | None]
    """Why it does not take (y, alpha, layout, blueprints), or None if it does."""
    slow: Callable[..., bool]
    """Whether a later one is faster on them, so that none but a name chooses it."""
    blend: Callable[..., Any]


IMPLEMENTATIONS = {
    "triton": _Implementation(
        ("gpu", "cuda"), triton.refusal, triton.slow, triton.blend
    ),
    "xla": _Implementation(None, lambda *_: None, lambda *_: False, reference.blend),
}
"""Implementations by name, in order of preference when the choice is automatic."""

_DTYPES = ("float32", "bfloat16", "float16")


def blend(
    y: Float[Array, "*B F"],
    bank: Bank,
    alpha: Float[Array, " K"],
    beta: Float[Array, " K"],
    blueprint: Int[Array, " K"],
    seed_of_slot: Int[Array, " K"],
    *,
    layout: ChunkLayout,
    blueprints: tuple[Blueprint, ...],
    incubation: Incubation = "task",
    statistics_rows: int | None = None,
    implementation: str | Sequence[str] | None = None,
    sharding: NamedSharding | None = None,
) -> tuple[Float[Array, "*B F"], Statistics, Float[Array, " K"]]:
    """Blends the living seeds' blueprints into a layer's output.

    On the chunk ``y_c`` of the seed that owns slot ``k``, with the blueprint's
    correction ``r(y_c) = f(y_c) - y_c`` and the cotangent ``g`` of the output:

    - forward: ``out = y_c + alpha * r(y_c)``;
    - backward: ``dy = g + alpha * J_y(r)^T g``, ``dtheta = beta * J_theta(r)^T g`` and
      ``dalpha = sum(g * r(y_c))``.

    A blueprint that reads the whole layer has ``r(y)`` for ``r(y_c)``, and its
    ``alpha * J_y(r)^T g`` reaches all of ``y``.

    So a slot with ``alpha 0, beta 1`` learns from the task while the output and the
    gradient of ``y`` stay bit-identical to those without it (a straight-through
    incubation), and one with ``alpha 1, beta 0`` counts in full but is frozen. A slot
    whose alpha and beta are both 0 is not computed: its ``dalpha`` is 0. ``beta`` has
    no gradient.

    Letters: ``B`` any leading batch shape, ``F`` features, ``S`` seeds, ``K`` slots,
    ``C`` chunk width, ``H`` hidden width.

    Args:
      y: output of the base layer, float32, bfloat16 or float16.
      bank: parameters of the blueprints, as `esper_jax.blueprints.init_bank` makes.
      alpha: how much each slot counts.
      beta: how much each slot learns.
      blueprint: index of each slot's blueprint in ``blueprints``.
      seed_of_slot: the seed that owns each slot; -1 for a free one, which is ignored.
        No seed may own two.
      layout: how the features are cut into chunks.
      blueprints: what may grow, as `esper_jax.blueprints.resolve` returns.
      incubation: what a slot learns from while its alpha is 0. With
        ``"reconstruction"`` its ``dtheta`` is instead ``beta`` times the gradient of
        ``mean(r(y_c)**2)`` at ``stop_gradient(y_c)``, whatever the task's loss.
      statistics_rows: over how many rows of the flattened batch of ``N`` the statistics
        are taken at most. They are spread evenly over all of it: row 0 and every
        ``ceil(N / statistics_rows)``-th after it. All rows if None; none if 0, and
        the counts are 0 then.
      implementation: ``"xla"`` (plain JAX), ``"triton"`` (fused GPU kernels), a
        sequence of names of which the first that supports the arguments is taken, or
        None: the fastest that supports them on the default device's platform, as it is
        while tracing. So where a GPU is the default and a function is compiled for the
        CPU, it must be named. A name never falls back.
      sharding: how ``y`` is laid out over a mesh, for use in plain `jax.jit`: each
        device then computes the chunks and rows that it holds, with any implementation.
        Without it, XLA divides plain JAX as it sees fit, and gathers ``y`` on every
        device for a kernel. All else must be replicated. No chunk may lie on two
        devices.

    Returns:
      The output, with y's shape and dtype; `Statistics` of ``y`` for each of the ``S``
      chunks, float32; and ``mean(r(y_c)**2)`` of each slot, float32 (0 for a slot whose
      alpha and beta are 0). The last two have no gradient.

    Raises:
      TypeError: if ``sharding`` is not a `NamedSharding`.
      ValueError: if a shape or dtype does not fit the layout, no implementation of
        that name exists, none of those named supports the arguments, or the layout does
        not fit the sharding.
    """
    _validate(y, bank, alpha, beta, blueprint, seed_of_slot, layout, blueprints)
    if incubation not in get_args(Incubation):
        raise ValueError(
            f"incubation must be one of {get_args(Incubation)}, got {incubation!r}"
        )
    if statistics_rows is not None and not (
        isinstance(statistics_rows, int) and statistics_rows >= 0
    ):
        raise ValueError(
            f"statistics_rows must be an integer, at least 0, or None for all; got "
            f"{statistics_rows!r}"
        )
    check_sharding(sharding)
    if sharding is not None:
        readers = [
            b.name for b in blueprints if isinstance(b, Custom) and b.reads == "layer"
        ]
        if readers and sharded.divides_features(sharding, y.ndim):
            raise ValueError(
                f"sharding: blueprint {readers[0]!r} reads the whole layer, whose "
                f"features {sharding.spec} divides among devices; divide the batch "
                "alone, or choose blueprints that read their chunk"
            )
        one_shard = functools.partial(
            blend,
            blueprints=blueprints,
            incubation=incubation,
            implementation=implementation,
        )
        return sharded.blend(
            one_shard,
            y,
            bank,
            alpha,
            beta,
            blueprint,
            seed_of_slot,
            layout=layout,
            sharding=sharding,
            statistics_rows=statistics_rows,
        )
    y, bank, alpha, beta, blueprint, seed_of_slot = collectives.same_varying(
        y, bank, alpha, beta, blueprint, seed_of_slot
    )
    flat = y.reshape(-1, layout.features)
    statistics_rows = _spread(statistics_rows, y.shape)
    chosen = _choose(implementation, flat, alpha, layout, blueprints)
    out, statistics, reconstruction = chosen.blend(
        flat,
        bank,
        alpha,
        beta,
        blueprint,
        seed_of_slot,
        layout,
        blueprints,
        incubation,
        statistics_rows,
    )
    return out.reshape(y.shape), statistics, reconstruction


def check_implementation(implementation: Any) -> None:
    """Makes sure that ``implementation`` is one of `blend`, whatever it supports.

    Raises:
      ValueError: if it is no name of one, no sequence of some, and not None.
    """
    named = [implementation] if isinstance(implementation, str) else implementation
    if named is None:
        return
    known = sorted(IMPLEMENTATIONS)
    if (
        not isinstance(named, Sequence)
        or not named
        or any(n not in known for n in named)
    ):
        raise ValueError(
            f"implementation must be one of {known}, a sequence of "
            f"them or None; got {implementation!r}"
        )


def _spread(rows: int | None, shape: tuple[int, ...]) -> int | None:
    """At most so many rows, with a stride that has no factor in common with the axes
    between the first and the last.

    With one in common the sample would hold the same few positions of every sequence
    or image.
    """
    count, inner = math.prod(shape[:-1]), math.prod(shape[1:-1])
    if not rows or rows >= count or inner == 1:
        return rows
    least = -(-count // rows)
    for stride in range(least, 2 * least):
        fewer = -(-count // stride)
        if math.gcd(stride, inner) == 1 and -(-count // fewer) == stride:
            return fewer
    return rows


def _choose(
    implementation: str | Sequence[str] | None, *arguments: Any
) -> _Implementation:
    """The first of the implementations asked for that takes the arguments."""
    check_implementation(implementation)
    if implementation is None:
        platform = _platform()
        names: Sequence[str] = [
            name
            for name, entry in IMPLEMENTATIONS.items()
            if entry.platforms is None or platform in entry.platforms
            if not entry.slow(*arguments)
        ]
    else:
        names = [implementation] if isinstance(implementation, str) else implementation
    refusals = []
    for name in names:
        why = IMPLEMENTATIONS[name].refusal(*arguments)
        if why is None:
            return IMPLEMENTATIONS[name]
        refusals.append(f"{name!r}: {why}")
    raise ValueError(
        f"implementation={implementation!r} does not support these arguments "
        f"({'; '.join(refusals)}); pass None to let blend choose"
    )


def _platform() -> str:
    """Platform that a function traced now is compiled for, if nobody says otherwise."""
    device = getattr(jax.config, "jax_default_device", None)
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def _validate(
    y: Array,
    bank: Bank,
    alpha: Array,
    beta: Array,
    blueprint: Array,
    seed_of_slot: Array,
    layout: ChunkLayout,
    blueprints: tuple[Blueprint, ...],
) -> None:
    if y.ndim < 1 or y.shape[-1] != layout.features:
        raise ValueError(
            f"y must have {layout.features} features on its last axis, as the layout "
            f"says; got shape {y.shape}"
        )
    if jnp.dtype(y.dtype).name not in _DTYPES:
        raise ValueError(f"y must be one of {', '.join(_DTYPES)}; got {y.dtype}")
    slots = seed_of_slot.shape
    if len(slots) != 1:
        raise ValueError(f"seed_of_slot must have shape (K,), got {slots}")
    for name, value, kind in (
        ("alpha", alpha, jnp.floating),
        ("beta", beta, jnp.floating),
        ("blueprint", blueprint, jnp.integer),
        ("seed_of_slot", seed_of_slot, jnp.integer),
    ):
        if value.shape != slots or not jnp.issubdtype(value.dtype, kind):
            raise ValueError(
                f"{name} must be {kind.__name__} of shape {slots}, one entry a slot; "
                f"got {value.dtype} of shape {value.shape}"
            )
    expected = jax.eval_shape(
        lambda: init_bank(
            jax.random.key(0), slots[0], blueprints, layout.width, layout.features
        )
    )
    _validate_bank(bank, expected)


def _validate_bank(bank: Bank, expected: Bank) -> None:
    want = jax.tree_util.tree_leaves_with_path(expected)
    paths = [path for path, _ in want]
    got_paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(bank)]
    if got_paths != paths:
        names = [jax.tree_util.keystr(path) for path in paths]
        raise ValueError(
            "bank must have the leaves that init_bank makes for these blueprints, "
            f"{names}; got {[jax.tree_util.keystr(path) for path in got_paths]}"
        )
    for (path, leaf), got in zip(want, jax.tree.leaves(bank), strict=True):
        name = "bank" + jax.tree_util.keystr(path)
        if got.shape != leaf.shape:
            raise ValueError(
                f"{name} must have shape {leaf.shape} for this number of slots, this "
                f"layout and these blueprints; got {got.shape}"
            )
        if not jnp.issubdtype(got.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {got.dtype}")
