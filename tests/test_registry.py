"""How backends of blend are found and chosen, and what is said where one is missing."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest
from test_backends import BACKENDS, ODD, OWN, SPECS, static

import esper_jax.kernels.blend as room
from esper_jax.kernels.blend import blend, check_implementation, reference, registry


def test_kernels_say_what_they_refuse() -> None:
    reasons = {odd: BACKENDS["triton"].refusal(*call) for odd, call in ODD.items()}
    assert reasons == {
        "custom": "blueprint 'own' is Custom, and only Dense ones are supported",
        "bounded": "incubation 'bounded' has no kernel",
        "wide": "chunks of 513 features are wider than 512",
        "no rows": "there are no rows or no slots",
        "no slots": "there are no rows or no slots",
    }


def test_a_name_never_falls_back() -> None:
    spec = dataclasses.replace(SPECS["matrices"], blueprints=("affine", OWN))
    args = spec.arrays(0)
    with pytest.raises(ValueError, match="'triton': blueprint 'own' is Custom"):
        blend(**args, **spec.options, implementation="triton")
    with pytest.raises(ValueError, match=r"must be one of \['triton', 'xla'\]"):
        blend(**args, **spec.options, implementation="cuda")
    out, _, _ = blend(**args, **spec.options, implementation=("triton", "xla"))
    assert out.shape == args["y"].shape


def test_plain_jax_is_the_last_choice() -> None:
    assert list(BACKENDS)[-1] == "xla"
    assert BACKENDS["xla"] is reference.BACKEND
    assert all(name == backend.name for name, backend in BACKENDS.items())
    assert not registry.missing()


FOLDER = """
import dataclasses
from esper_jax.kernels.blend.reference import BACKEND as plain
BACKEND = dataclasses.replace(
    plain, name="toy", preference=5, refusal=lambda s, rows, slots:
    "there is one row" if rows == 1 else None,
)
"""


def test_one_more_folder_is_one_more_backend(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, text in (("toy", FOLDER), ("broken", "import not_installed")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(text)
    monkeypatch.setattr(room, "__path__", [*room.__path__, str(tmp_path)])
    caches = (registry._names, registry._found)
    try:
        for cache in caches:
            cache.cache_clear()
        assert list(registry.backends()) == ["toy", "triton", "xla"]
        check_implementation(["toy", "broken"])
        s = static(SPECS["wide"])
        assert registry.choose(None, s, 2, 2).name == "toy"
        with pytest.raises(ValueError, match="'broken': it cannot be imported"):
            registry.choose("broken", s, 2, 2)
        # Every refusal is in the error, in the order asked for.
        both = "'toy': there is one row; 'broken': it cannot be imported"
        with pytest.raises(ValueError, match=both):
            registry.choose(["toy", "broken"], s, 1, 2)
        assert registry.choose(["broken", "toy"], s, 2, 2).name == "toy"
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()
        sys.modules.pop(f"{room.__name__}.toy", None)


HIDDEN = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None
import esper_jax
import jax
import jax.numpy as jnp
from esper_jax.kernels.blend import blend, check_implementation, registry
from esper_jax.kernels.blend.arg_specs import ArgSpec

assert "esper_jax.kernels.blend.triton" not in sys.modules
spec = ArgSpec(name="s", rows=2, features=4, num_seeds=2, dtype="float32")
args = spec.arrays(0)
jax.default_backend = lambda: "gpu"
for choice in (None, "xla", ("triton", "xla")):
    out, _, _ = blend(**args, **spec.options, implementation=choice)
    assert jnp.any(out != args["y"]), choice
assert list(registry.backends()) == ["xla"]
check_implementation("triton")  # The name of a backend, though it is missing here.
try:
    blend(**args, **spec.options, implementation="triton")
except ValueError as error:
    print(error)
else:
    raise AssertionError("triton was not refused")
"""


def test_where_pallas_triton_is_missing_plain_jax_takes_over() -> None:
    path = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN],
        env={**os.environ, "PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "'triton': it cannot be imported with jax" in done.stdout
    assert "jax.experimental.pallas.triton" in done.stdout
    assert "pass None to let blend choose" in done.stdout
