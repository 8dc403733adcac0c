"""Whole runs of `adapt.py` as one program: pretraining, and arms without seeds.

Every run draws its host, its change of the target and its batches from its own key, the
same in every arm. Runs are vmapped.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from adapt_tasks import Parts, Task
from flax import nnx

__all__ = ["Arm", "Outcome", "Params", "Run", "plain_arms", "pretrained", "schedule"]

Params = dict[str, Any]
"""Arrays by path, joined by slashes."""

WARM_UP = 10


class Run(NamedTuple):
    """What differs between runs."""

    host: Params
    """Parameters of the pretrained host."""
    key: jax.Array
    rate: jax.Array
    """Peak learning rate."""
    budget: jax.Array
    """Most parameters that a trial keeps."""


class Outcome(NamedTuple):
    """What became of a run."""

    held_out: jax.Array
    """Loss and score on the data that arms are tuned by, (2,)."""
    test: jax.Array
    """Loss and score on test data, (2,)."""
    parameters: jax.Array
    """Parameters beside the frozen host's, or those of it that were trained."""
    places: Any
    """Parameters by layer; None where they are the same in all runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to adapt a host.

    Args:
      run: ``run(task, parts, run) -> Outcome``; vmapped by its caller. The parts are
        changed already.
      peak: most parameters that it holds at a time.
      evaluations: passes over the judged data, of one run.
      backward: matrix products of a step over those of a forward pass.
    """

    run: Callable[[Task, Parts, Run], Outcome]
    peak: int
    evaluations: int = 0
    backward: float = 2.0


def split(task: Task, rngs: nnx.Rngs) -> tuple[Any, Params]:
    """Graph and parameters of a host."""
    graph, state = nnx.split(task.make(rngs))
    flat = nnx.to_flat_state(state)
    return graph, {"/".join(map(str, p)): leaf[...] for p, leaf in flat}


def merged(task: Task, params: Params) -> Any:
    """The host with those parameters."""
    graph, state = nnx.split(task.make(nnx.Rngs(0)))
    flat = [
        (path, leaf.replace(params["/".join(map(str, path))]))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def schedule(steps: int) -> optax.Schedule:
    """From 1 to 0 by a cosine."""
    return optax.cosine_decay_schedule(1.0, steps)


def batch_of(task: Task, learned: Any, key: jax.Array, step: jax.Array) -> Any:
    """The batch of a step, the same in every arm."""
    return task.sample(learned, jax.random.fold_in(key, step))


def measured(task: Task, params: Params, parts: Parts) -> tuple[jax.Array, jax.Array]:
    """Loss and score on held-out and on test data."""
    model = merged(task, params)
    seen = (jnp.stack(task.loss(model, p)) for p in (parts.held_out, parts.test))
    held_out, test = seen
    return held_out, test


def pretrained(task: Task, keys: jax.Array) -> Params:
    """Parameters of hosts that learned the source, one of each key."""
    learned = jax.tree.map(jnp.asarray, task.source().learned)

    def one(key: jax.Array) -> Params:
        _, params = split(task, nnx.Rngs(key))
        steps = task.pretrain
        rate = optax.cosine_decay_schedule(3e-3, steps)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

        def step(carry: Any, i: jax.Array) -> tuple[Any, jax.Array]:
            params, moments = carry
            batch = batch_of(task, learned, key, i)
            loss, grads = jax.value_and_grad(
                lambda p: task.loss(merged(task, p), batch)[0]
            )(params)
            updates, moments = optimizer.update(grads, moments, params)
            return (optax.apply_updates(params, updates), moments), loss

        start = params, optimizer.init(params)
        (params, _), _ = jax.lax.scan(step, start, jnp.arange(steps))
        return params

    return jax.jit(jax.vmap(one))(keys)


class _Form(NamedTuple):
    """What a plain arm trains."""

    start: Callable[[jax.Array, Params], Any]
    """``start(key, host)``: what is trained."""
    weights: Callable[[Params, Any, Any], Params]
    """``weights(host, trained, kept)``: the adapted host."""
    penalty: Callable[[Any], Any] = lambda _: 0.0
    kept: Callable[[Any], Any] = lambda _: ()
    """First value of what is carried beside what is trained."""
    after: Callable[..., Any] = lambda trained, grads, kept, step: (trained, kept)


def _train(task: Task, form: _Form, parts: Parts, run: Run) -> Params:
    """The adapted host."""
    optimizer = optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_schedule(optax.linear_schedule(0.0, 1.0, WARM_UP)),
        optax.scale_by_schedule(schedule(task.steps)),
    )

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        trained, moments, kept = carry
        batch = batch_of(task, parts.learned, run.key, i)

        def loss(trained: Any) -> jax.Array:
            model = merged(task, form.weights(run.host, trained, kept))
            return task.loss(model, batch)[0] + form.penalty(trained)

        grads = jax.grad(loss)(trained)
        updates, moments = optimizer.update(grads, moments)
        trained = jax.tree.map(lambda p, u: p - run.rate * u, trained, updates)
        trained, kept = form.after(trained, grads, kept, i)
        return (trained, moments, kept), None

    trained = form.start(jax.random.fold_in(run.key, task.steps), run.host)
    start = trained, optimizer.init(trained), form.kept(trained)
    (trained, _, kept), _ = jax.lax.scan(step, start, jnp.arange(task.steps))
    return form.weights(run.host, trained, kept)


def _plain(form: _Form, parameters: int, **more: Any) -> Arm:
    def run(task: Task, parts: Parts, of: Run) -> Outcome:
        held_out, test = measured(task, _train(task, form, parts, of), parts)
        return Outcome(held_out, test, jnp.asarray(parameters), None)

    return Arm(run=run, peak=more.pop("peak", parameters), **more)


def _part_of_host(chosen: Callable[[str], bool]) -> _Form:
    """Trains some of the host's own parameters."""
    return _Form(
        start=lambda key, host: {n: p for n, p in host.items() if chosen(n)},
        weights=lambda host, trained, kept: {**host, **trained},
    )


Shapes = dict[str, tuple[int, int, int]]
"""Number, rows and columns of matrices of one shape, by path: a stack is several."""


def kernels(host: Params) -> Shapes:
    """The matrices that low rank may be added to."""
    return {
        name: (math.prod(p.shape[:-2]), *p.shape[-2:])
        for name, p in host.items()
        if name.endswith(("kernel", "embedding"))
    }


def _added(host: Params, products: Params) -> Params:
    """The host with products added to its matrices, (n, rows, columns)."""
    new = {n: host[n] + d.reshape(host[n].shape) for n, d in products.items()}
    return {**host, **new}


def _uniform(ranks: dict[str, int]) -> _Form:
    """LoRA (arXiv:2106.09685): ``A`` random, ``B`` 0."""

    def start(key: jax.Array, host: Params) -> Any:
        shapes, parts = kernels(host), {}
        for i, (name, rank) in enumerate(sorted(ranks.items())):
            n, rows, columns = shapes[name]
            drawn = jax.random.normal(jax.random.fold_in(key, i), (n, rows, rank))
            parts[name] = drawn / math.sqrt(rows), jnp.zeros((n, rank, columns))
        return parts

    def weights(host: Params, parts: Any, _: Any) -> Params:
        return _added(host, {n: a @ b for n, (a, b) in parts.items()})

    return _Form(start=start, weights=weights)


def _adaptive(shapes: Shapes, rank: int, budget: int, steps: int) -> _Form:
    """AdaLoRA (arXiv:2303.10512): ``P diag(l) Q``, pruned to the budget by importance.

    As in its paper, but that a triplet pays for its parameters, as layers differ here.
    Pruned every tenth step from a tenth to a half of the run, by a cubic schedule.
    """
    costs = {
        name: jnp.full((n, rank), rows + columns + 1)
        for name, (n, rows, columns) in shapes.items()
    }
    whole = sum(int(cost.sum()) for cost in costs.values())

    def start(key: jax.Array, host: Params) -> Any:
        parts = {}
        for i, (name, (n, rows, columns)) in enumerate(sorted(shapes.items())):
            p, q = jax.random.split(jax.random.fold_in(key, i))
            parts[name] = {
                "p": jnp.linalg.qr(jax.random.normal(p, (n, rows, rank)))[0],
                "l": jnp.zeros((n, rank)),
                "q": jnp.linalg.qr(jax.random.normal(q, (n, columns, rank)))[0].mT,
            }
        return parts

    def weights(host: Params, parts: Any, _: Any) -> Params:
        of = {n: (t["p"] * t["l"][:, None]) @ t["q"] for n, t in parts.items()}
        return _added(host, of)

    def penalty(parts: Any) -> jax.Array:
        eye = jnp.eye(rank)
        return 0.1 * sum(
            jnp.sum((t["p"].mT @ t["p"] - eye) ** 2)
            + jnp.sum((t["q"] @ t["q"].mT - eye) ** 2)
            for t in parts.values()
        )

    def kept(parts: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, parts)
        return zeros, zeros, {n: jnp.ones(c.shape, bool) for n, c in costs.items()}

    def after(parts: Any, grads: Any, kept: Any, step: jax.Array) -> Any:
        mean, doubt, mask = kept
        now = jax.tree.map(lambda p, g: jnp.abs(p * g), parts, grads)
        mean = jax.tree.map(lambda m, s: 0.85 * m + 0.15 * s, mean, now)
        doubt = jax.tree.map(
            lambda d, m, s: 0.85 * d + 0.15 * jnp.abs(s - m), doubt, mean, now
        )
        of = jax.tree.map(jnp.multiply, mean, doubt)
        scores = {
            n: t["l"] + t["p"].mean(axis=1) + t["q"].mean(axis=2) for n, t in of.items()
        }
        begin, end = steps // 10, steps // 2
        left = jnp.clip((end - step) / (end - begin), 0, 1)
        room = budget + (whole - budget) * left**3
        new = _within(scores, costs, room)
        prunes = (step >= begin) & (step <= end) & (step % 10 == 0)
        mask = {n: jnp.where(prunes, new[n], mask[n]) for n in mask}
        parts = {n: {**t, "l": jnp.where(mask[n], t["l"], 0)} for n, t in parts.items()}
        return parts, (mean, doubt, mask)

    return _Form(start, weights, penalty, kept, after)


def _within(scores: Params, costs: Params, room: jax.Array) -> Params:
    """Those of the highest scores that the room covers."""
    names = sorted(scores)
    score = jnp.concatenate([scores[n].reshape(-1) for n in names])
    cost = jnp.concatenate([costs[n].reshape(-1) for n in names])
    order = jnp.argsort(-score)
    taken = jnp.zeros(len(score), bool).at[order].set(jnp.cumsum(cost[order]) <= room)
    ends = np.cumsum([scores[n].size for n in names])[:-1]
    each = jnp.split(taken, ends)
    return {n: x.reshape(scores[n].shape) for n, x in zip(names, each, strict=True)}


def plain_arms(task: Task, budget: int) -> dict[str, Arm]:
    """The arms without seeds. Those of a fixed size are the same at every budget."""
    _, host = split(task, nnx.Rngs(0))
    shapes = kernels(host)
    size = {n: math.prod(p.shape) for n, p in host.items()}

    def some(chosen: Callable[[str], bool]) -> int:
        return sum(s for n, s in size.items() if chosen(n))

    ranks = {n: task.uniform(budget, n.rpartition("/")[0]) for n in shapes}
    ranks = {n: rank for n, rank in ranks.items() if rank}
    each = {name: n * (rows + columns) for name, (n, rows, columns) in shapes.items()}
    used = sum(rank * each[name] for name, rank in ranks.items())
    wide = max(1, math.ceil(1.5 * budget / sum(each.values())))
    most = wide * (sum(each.values()) + sum(n for n, *_ in shapes.values()))
    adaptive = _adaptive(shapes, wide, budget, task.steps)
    arms = {
        "uniform LoRA": _plain(_uniform(ranks), used),
        "AdaLoRA": _plain(adaptive, budget, peak=most),
    }
    fixed: dict[str, Callable[[str], bool]] = {
        "biases": lambda n: n.endswith("bias"),
        "last layer": lambda n: n.startswith("head"),
    }
    if task.score == "bits":
        fixed["embeddings"] = lambda n: n.startswith(("head", "tokens"))
    fixed["everything"] = lambda n: True
    for name, chosen in fixed.items():
        backward = 3.0 if name == "everything" else 2.0
        form = _part_of_host(chosen)
        arms[name] = _plain(form, some(chosen), backward=backward)
    return arms
