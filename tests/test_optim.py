"""`per_slot` against as many separate optimizers as there are slots."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from esper_jax.optim import per_slot, scale_by_run_schedule

K, STEPS = 4, 6
INNER = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2)),
    "schedule": optax.adam(optax.cosine_decay_schedule(0.1, STEPS)),
}


def tree(rng: np.random.Generator, scale: float = 1.0) -> dict[str, Any]:
    return {
        "w": jnp.asarray(scale * rng.normal(size=(K, 3, 2)), jnp.float32),
        "b": jnp.asarray(scale * rng.normal(size=(K,)), jnp.float32),
    }


def slot(x: Any, k: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[k], x)


def bits(x: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(x)]


def trajectory(steps: int = STEPS) -> list[tuple[Any, np.ndarray, np.ndarray]]:
    """Gradients, active and born of each step. Frozen slots get NaN gradients."""
    rng = np.random.default_rng(7)
    plan = []
    for i in range(steps):
        active = rng.random(K) < 0.7
        born = (rng.random(K) < 0.25) & (i > 0)
        grads = jax.tree.map(
            lambda g, off=~active: jnp.where(
                off.reshape(K, *[1] * (g.ndim - 1)), jnp.nan, g
            ),
            tree(rng, 3.0),
        )
        plan.append((grads, active, born))
    return plan


@pytest.mark.parametrize("name", INNER)
def test_every_slot_is_optimized_as_if_alone(name: str) -> None:
    inner, plan = INNER[name], trajectory()
    optimizer = per_slot(inner)
    params = start = tree(np.random.default_rng(1))
    state = optimizer.init(params)
    traces = []

    @jax.jit
    def step(params: Any, state: Any, grads: Any, active: Any, born: Any) -> Any:
        traces.append(1)
        updates, state = optimizer.update(
            grads, state, params, active=active, born=born
        )
        return optax.apply_updates(params, updates), state, updates

    # The truth: K optimizers of optax in a loop.
    update = jax.jit(inner.update)
    own = [slot(start, k) for k in range(K)]
    own_state = [inner.init(p) for p in own]
    for grads, active, born in plan:
        before = jax.device_get((params, state))
        params, state, updates = step(params, state, grads, active, born)
        for k in range(K):
            if born[k]:
                own_state[k] = inner.init(own[k])
            if active[k]:
                u, own_state[k] = update(slot(grads, k), own_state[k], own[k])
                own[k] = optax.apply_updates(own[k], u)
            else:
                assert not any(np.any(u) for u in jax.tree.leaves(slot(updates, k)))
                kept = slot(before[0], k)
                assert bits(slot(params, k)) == bits(kept)
                if not born[k]:
                    assert bits(slot(state, k)) == bits(slot(before[1], k))
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7),
                (slot(params, k), slot(state, k)),
                (own[k], own_state[k]),
            )
    assert any(np.any(a & b) for _, a, b in plan)
    assert any(np.any(~a & b) for _, a, b in plan)
    assert len(traces) == 1


def test_frozen_parameters_keep_their_bits_negative_zero_too() -> None:
    optimizer = per_slot(optax.sgd(0.1))
    params = jnp.full((2, 1), -0.0)
    grads = jnp.asarray([[1.0], [jnp.nan]])
    updates, _ = optimizer.update(
        grads, optimizer.init(params), params, active=jnp.asarray([True, False])
    )
    after = optax.apply_updates(params, updates)
    assert np.signbit(np.asarray(after)[1, 0])
    assert after[0, 0] == np.float32(-0.1)


def test_reset_starts_only_the_newborn_afresh() -> None:
    optimizer = per_slot(INNER["adam"])
    params = tree(np.random.default_rng(2))
    fresh = optimizer.init(params)
    _, state = optimizer.update(params, fresh, params, active=jnp.ones(K, bool))
    born = jnp.asarray([False, True, False, True])
    got = optimizer.reset(state, params, born)
    for k in range(K):
        assert bits(slot(got, k)) == bits(slot(fresh if born[k] else state, k))


def test_further_arguments_reach_the_inner_optimizer() -> None:
    inner = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda g, s, p=None, *, gain, **_: (jax.tree.map(lambda x: gain * x, g), s),
    )
    optimizer = per_slot(inner)
    params = tree(np.random.default_rng(3))
    updates, _ = optimizer.update(
        params,
        optimizer.init(params),
        params,
        active=jnp.arange(K) != 1,
        gain=jnp.float32(2.0),
    )
    np.testing.assert_array_equal(updates["b"], 2 * params["b"].at[1].set(0))


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="inner must be an optax optimizer, got 'adam'"):
        per_slot("adam")  # type: ignore[arg-type]
    optimizer = per_slot(INNER["adam"])
    params = tree(np.random.default_rng(4))
    state = optimizer.init(params)
    active = jnp.ones(K, bool)
    with pytest.raises(ValueError, match=r"active must have one entry .*\(3,\)"):
        optimizer.update(params, state, params, active=active[:3])
    with pytest.raises(ValueError, match="born must have one entry"):
        optimizer.update(params, state, params, active=active, born=active[:1])
    with pytest.raises(ValueError, match=r"params\['b'\] has shape \(\)"):
        optimizer.reset(state, params | {"b": jnp.float32(0)}, active)
    with pytest.raises(TypeError, match="active"):
        optimizer.update(params, state, params)


def test_a_run_schedule_is_at_the_run_s_step_in_every_slot() -> None:
    optimizer = per_slot(
        optax.chain(optax.sgd(1.0), scale_by_run_schedule(lambda step: 1 / (1 + step)))
    )
    params = tree(np.random.default_rng(1))
    state = optimizer.init(params)
    grads = tree(np.random.default_rng(2))
    active, born = np.array([True, True, False, False]), np.array([False, True] * 2)
    for step in (0, 3, 9):
        updates, state = optimizer.update(
            grads, state, params, active=active, born=born, step=jnp.asarray(step)
        )
        for update, grad in zip(
            jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True
        ):
            np.testing.assert_allclose(update[:2], -grad[:2] / (1 + step), rtol=1e-6)
            np.testing.assert_array_equal(update[2:], 0)


def test_a_run_schedule_needs_the_step() -> None:
    optimizer = per_slot(scale_by_run_schedule(lambda step: 1.0))
    params = tree(np.random.default_rng(1))
    with pytest.raises(TypeError, match="step"):
        optimizer.update(
            params, optimizer.init(params), params, active=np.ones(K, bool)
        )
