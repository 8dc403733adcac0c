"""Growth without Flax: `blend`, `lifecycle` and `per_slot` on dictionaries of arrays.

A linear layer cannot fit the target. We lead one seed through its life by hand; with it
the layer fits.
"""

import jax
import jax.numpy as jnp
import optax

import esper_jax as ej
from esper_jax import Stage, lifecycle
from esper_jax.blueprints import init_bank, resolve
from esper_jax.lifecycle.state import slot_coefficients

layout, kinds = ej.ChunkLayout(features=8, num_seeds=4), resolve(["residual_mlp"])
ramp = ej.GraftConfig(ramp_duration=5)
gates = ej.LifecycleConfig(min_epochs=(0,) * 11, grafting=ramp)
host, slots = optax.adam(1e-2), ej.per_slot(optax.adam(1e-2))

keys = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(keys[0], (256, 8))
target = x.at[:, 2:4].set(jnp.abs(x[:, 2:4]))  # seed 1 watches features 2 and 3
params = {"w": jnp.eye(8) + 0.1 * jax.random.normal(keys[1], (8, 8))}
bank = {"layer": init_bank(keys[2], 2, kinds, layout.width)}
seeds = {"layer": ej.init_seeds(num_seeds=4, capacity=2)}
states = host.init(params), slots.init(bank)


def loss(params, bank, seeds):
    slot_of = (*slot_coefficients(seeds["layer"]), seeds["layer"].seed_of_slot)
    y, kw = x @ params["w"], {"layout": layout, "blueprints": kinds}
    return jnp.mean((ej.blend(y, bank["layer"], *slot_of, **kw)[0] - target) ** 2)


@jax.jit
def step(params, bank, seeds, states):
    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(params, bank, seeds)
    learns = slot_coefficients(seeds["layer"])[1] > 0
    updates, first = host.update(grads[0], states[0])
    grown, second = slots.update(grads[1], states[1], bank, active=learns)
    params, bank = optax.apply_updates((params, bank), (updates, grown))
    return params, bank, (first, second), value


tick = jax.jit(lifecycle.step, static_argnums=3)
signals = ej.Signals.unmeasured(
    reconstruction_loss=0.01, worth=0.01, mean_worth=0.01, stability=1.0
)
wait = [None] * 10
for goal in [*wait, *list(Stage)[1:4], *wait, *list(Stage)[4:7], *wait, Stage(7)]:
    commands = lifecycle.commands_for(4, {1: goal} if goal else {})
    seeds["layer"], _ = tick(seeds["layer"], commands, signals, gates)
    for _ in range(20):
        params, bank, states, value = step(params, bank, seeds, states)
    alpha, stage = ej.coefficients(seeds["layer"])[0][1], seeds["layer"].stage[1]
    print(f"{Stage(int(stage)).name:13} alpha {alpha:.1f} loss {value:.4f}")
