"""The entry point of blend: validates once, then dispatches."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from esper_jax.blueprints import Bank, Blueprint
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend import adapters, sharded, vjp
from esper_jax.kernels.blend.adapters import Read
from esper_jax.kernels.blend.backend import Results
from esper_jax.kernels.blend.checks import (
    check_arguments,
    check_bias,
    check_whole_layer,
)
from esper_jax.kernels.blend.registry import choose
from esper_jax.kernels.blend.sharded import check_sharding
from esper_jax.kernels.blend.static import Slots, Static
from esper_jax.lifecycle.signals import Statistics
from esper_jax.lifecycle.stages import Incubation
from esper_jax.parallel import collectives

__all__ = ["blend", "takes_bias", "tapped"]


@jax.named_scope("esper/blend")
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
    forward_mode: bool = False,
    bias: Float[Array, " F"] | None = None,
    x: Any = None,
    hook: Any = None,
) -> tuple[Float[Array, "*B F"], Statistics, Float[Array, " K"]]:
    """Blends the living seeds' blueprints into a layer's output.

    On the chunk ``y_c`` of the seed that owns slot ``k``, with the blueprint's
    correction ``r(y_c) = f(y_c) - y_c`` and the cotangent ``g`` of the output:

    - forward: ``out = y_c + alpha * r(y_c)``;
    - backward: ``dy = g + alpha * J_y(r)^T g``, ``dtheta = beta * J_theta(r)^T g`` and
      ``dalpha = sum(g * r(y_c))``.

    A blueprint that reads the whole layer has ``r(y)`` in place of ``r(y_c)``, and its
    ``alpha * J_y(r)^T g`` reaches all of ``y``. An `Adapter` that reads the layer's
    input ``x`` has ``r(x)``, and its ``alpha * J_x(r)^T g`` goes to ``x``. Adapters add
    to every feature of the output; where no adapter counts, nothing is added.

    A slot with ``alpha 0, beta 1`` learns from the task, while the output and the
    gradient of ``y`` stay bit-identical to those without it (straight-through
    incubation). A slot with ``alpha 1, beta 0`` counts in full but is frozen. A slot
    whose alpha and beta are both 0 is not computed: its ``dalpha`` is 0. ``beta`` has
    no gradient.

    Letters: ``B`` any leading batch shape, ``F`` features, ``S`` seeds, ``K`` slots,
    ``C`` chunk width, ``H`` hidden width.

    Args:
      y: output of the base layer: float32, bfloat16, float16, or float64, which plain
        JAX alone takes.
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
        ``mean(r(y_c)**2)`` at ``stop_gradient(y_c)``, whatever the task's loss. With
        ``"bounded"``, ``beta * J_theta(r)^T (g + rms(g) / rms(y_c) * r(y_c))``, in
        plain JAX alone (`static.bound`); for an adapter, of all features. Each device
        takes the ratio of its own rows.
      statistics_rows: number of rows of the flattened batch of ``N`` to take statistics
        over, at most. They are spread evenly over the batch: row 0 and about every
        ``ceil(N / statistics_rows)``-th after it. All rows if None. If 0, no row is
        read and the counts are 0.
      implementation: ``"xla"`` (plain JAX), ``"triton"`` (fused GPU kernels), a
        sequence of names, of which blend takes the first that supports the arguments,
        or None. None takes the fastest that supports them on the platform that is the
        default while tracing. To compile for the CPU where a GPU is the default, name
        one. A name never falls back.
      sharding: how ``y`` is laid out over a mesh, for use in plain `jax.jit`. Each
        device then computes the chunks and rows that it holds, with any implementation.
        Without it, XLA divides plain JAX as it sees fit, and gathers ``y`` on every
        device for a kernel. (On a mesh of explicit axes, too; the output lies as ``y``
        does.) All other arguments must be replicated. No chunk may lie
        on two devices.
      forward_mode: whether forward-mode derivatives (`jax.jvp`, `jacfwd`, `hessian`,
        `linearize`) work too, by plain JAX. They follow the rules above: the tangent of
        the output is ``y' + alpha * J_y(r) y' + beta * J_theta(r) theta' + alpha' r``.
        Gradients are the same to rounding, but for the ``dtheta`` of a slot with alpha
        0: with ``"reconstruction"`` it is 0, with ``"bounded"`` the task's. Backward
        passes keep more in memory.
      bias: a vector that belongs to ``y``, cast to its dtype: every result is that of
        ``y + bias``. Kernels that can add it while they read ``y`` do, and XLA adds it
        to the output, where it fuses with what follows: so ``y + bias`` never goes to
        memory, nor is the gradient of ``bias`` a pass of its own. For others ``y +
        bias`` is computed first.
      x: input of the layer, for blueprints that read it: of shape (*B, D), or integer
        ids of shape (*B), which choose rows of ``W1``.
      hook: what `tapped` returned with ``x``: then ``x`` gets its gradient by that.

    Returns:
      The output, with y's shape and dtype; `Statistics` of ``y`` for each of the ``S``
      chunks, float32; and ``mean(r(y_c)**2)`` of each slot, float32 (0 for a slot whose
      alpha and beta are 0). The last two have no gradient.

    Raises:
      TypeError: if ``sharding`` is not a `NamedSharding`; by forward-mode derivatives
        where they do not work. Where `jax.jit` lies between, that error is JAX's own.
      ValueError: if a shape or dtype does not fit the layout, no implementation of
        that name exists, none of those named supports the arguments, or the layout does
        not fit the sharding.
    """
    slots = Slots(alpha, beta, blueprint, seed_of_slot)
    s = Static(
        layout=layout,
        blueprints=blueprints,
        incubation=incubation,
        statistics_rows=statistics_rows,
        dtype=jnp.dtype(y.dtype).name,
    )
    check_arguments(s, (y, x), bank, slots)
    check_bias(s, bias)
    s = adapters.split(s)
    check_sharding(sharding)
    if bias is not None:
        y, bias = _apart(implementation, s, y, bias, slots)
    local = functools.partial(_on_one_device, implementation, forward_mode)
    if sharding is None:

        def one(y: Array, x: Any, hook: Any, *rest: Any) -> Results:
            return local(s, Read(y, x, hook), *rest)

        return collectives.automatic(one, y, x, hook, bias, bank, slots, others=2)
    check_whole_layer(s, sharding, y.ndim)
    return sharded.blend(local, s, sharding, (Read(y, x), bias), bank, slots)


def tapped(
    x: Any,
    bank: Bank,
    slots: Slots,
    *,
    layout: ChunkLayout,
    blueprints: tuple[Blueprint, ...],
    incubation: Incubation = "task",
    implementation: str | Sequence[str] | None = None,
) -> tuple[Any, Float[Array, "*B M"] | None]:
    """The input of a layer as its base layer and `blend` should both get it.

    Args:
      x: the input, of shape (*B, D).
      bank: as for `blend`.
      slots: coefficients, kinds and owners, as for `blend`.
      layout: as for `blend`.
      blueprints: as for `blend`.
      incubation: as for `blend`.
      implementation: as for `blend`.

    Returns:
      ``x``, and the hook that `blend` takes. The same ``x`` and None where nothing is
      gained: where adapters do not read the input, it is not floating point, or no
      kernel adds to its gradient in place.

    Raises:
      TypeError: by forward-mode derivatives, which do not work through it.
    """
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or x.ndim < 2:
        return x, None
    s = adapters.split(
        Static(
            layout=layout,
            blueprints=blueprints,
            incubation=incubation,
            dtype=jnp.dtype(dtype).name,
        )
    )
    readers = [b for _, b in s.adapters if b.reads == "input"]
    if not readers or any(b.inputs != x.shape[-1] for b in readers):
        return x, None
    if jax.typeof(x).sharding.mesh.explicit_axes:
        return x, None
    flat = x.reshape(-1, x.shape[-1])
    rows, count = len(flat), len(slots.alpha)
    try:
        backend = choose(implementation, s, rows, count)
    except ValueError:  # which blend will say
        return x, None
    if backend.products is None:
        return x, None
    bank, slots = jax.lax.stop_gradient((bank, slots))
    flat, bank, slots = collectives.same_varying(flat, bank, slots)
    s = backend.prepare(s, rows)
    with vjp.forward_mode_explained(backend, forward_mode=False):
        out, hook = adapters.tap(backend, s, flat, bank, slots)
    return out.reshape(x.shape), hook.reshape(*x.shape[:-1], -1)


def takes_bias(
    dtype: Any,
    slots: int,
    *,
    layout: ChunkLayout,
    blueprints: tuple[Blueprint, ...],
    incubation: Incubation = "task",
    implementation: str | Sequence[str] | None = None,
) -> bool:
    """Whether it pays to pass a layer's bias to `blend` apart from its output.

    It does where `blend` would choose kernels that take it. Otherwise, let the layer
    add it.

    Args:
      dtype: of ``y``.
      slots: ``K``.
      layout: how the features are cut into chunks.
      blueprints: what may grow.
      incubation: as for `blend`.
      implementation: what is asked for.
    """
    s = Static(
        layout=layout,
        blueprints=blueprints,
        incubation=incubation,
        dtype=jnp.dtype(dtype).name,
    )
    s = adapters.split(s)
    try:
        return choose(implementation, s, 1, slots).takes_bias
    except ValueError:  # which blend will say
        return False


def _apart(
    implementation: str | Sequence[str] | None,
    s: Static,
    y: Array,
    bias: Array,
    slots: Slots,
) -> tuple[Array, Array | None]:
    """The bias as kernels take it apart, or ``y`` with its bias."""
    bias = bias.astype(y.dtype)
    backend = choose(implementation, s, math.prod(y.shape[:-1]), len(slots.alpha))
    if backend.takes_bias:
        return y, bias
    # As layers of Flax add it, to be the same program.
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,)), None


def _on_one_device(
    implementation: str | Sequence[str] | None,
    forward_mode: bool,
    s: Static,
    read: Read,
    bias: Array | None,
    bank: Bank,
    slots: Slots,
) -> tuple[Float[Array, "*B F"], Statistics, Float[Array, " K"]]:
    """`blend` of what one device holds, on arguments already checked."""
    if not any(b.reads == "input" for _, b in s.adapters):
        read = Read(read.y, None)
    if read.hook is not None:
        read = read._replace(x=jax.lax.stop_gradient(read.x))
    read, bias, bank, slots = collectives.same_varying(read, bias, bank, slots)
    y, x, hook, _ = read
    flat = y.reshape(-1, s.layout.features)
    if x is not None:
        x = x.reshape(flat.shape[0], *x.shape[y.ndim - 1 :])
    if hook is not None:
        hook = hook.reshape(flat.shape[0], -1)
    s = dataclasses.replace(s, statistics_rows=_spread(s.statistics_rows, y.shape))
    backend = choose(implementation, s, flat.shape[0], slots.alpha.shape[0])
    out, statistics, reconstruction = vjp.blend(
        backend, s, Read(flat, x, hook), bank, slots, forward_mode, bias
    )
    return out.reshape(y.shape), statistics, reconstruction


def _spread(rows: int | None, shape: tuple[int, ...]) -> int | None:
    """Number of rows to sample, ``rows`` or a little fewer.

    Makes the stride coprime to the product of the axes between the first and the last.
    With a common factor, the sample would hold the same few positions of every sequence
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
