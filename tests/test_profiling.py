"""Named scopes in what is compiled, so that a profile can be read."""

import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax import LifecycleConfig, build
from esper_jax.hosts import MLP

PAGE = Path(__file__).parents[1] / "docs" / "monitoring.md"
TICK = {"evaluate", "worth", "signals", "lifecycle", "policy", "births", "blend"}
STEP = {"blend", "banks", "watch", "optimizer"}


@pytest.fixture(scope="module")
def lowered():
    """Step and tick of a small model, as HLO."""
    program = build(
        MLP(6, (8, 8), 3, num_seeds=4, capacity=2, rngs=nnx.Rngs(0)),
        optax.adam(1e-2),
        optax.adam(1e-3),
        lifecycle_config=LifecycleConfig(),
    )
    state = program.init(jax.random.key(0))
    batch = np.ones((16, 6), np.float32), np.zeros(16, np.int32)
    functions = {name: jax.jit(getattr(program, name)) for name in ("step", "tick")}
    return {
        name: function.lower(state, batch).as_text("hlo", debug_info=True)
        for name, function in functions.items()
    }


def scopes(text):
    """The scopes in the metadata of operations."""
    names = re.findall(r'op_name="([^"]*)"', text)
    return {scope for name in names for scope in re.findall(r"esper/(\w+)", name)}


def test_operations_stand_in_named_scopes(lowered):
    assert scopes(lowered["step"]) == STEP
    assert scopes(lowered["tick"]) == TICK
    # The backward pass of blend is a rule of our own, which takes the scope along.
    assert re.search(r'op_name="[^"]*transpose\([^"]*esper/blend', lowered["step"])


def test_the_docs_list_the_scopes():
    rows = re.findall(r"^\| `esper/(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert set(rows) == STEP | TICK
    assert len(rows) == len(set(rows))
