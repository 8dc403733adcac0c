"""Options of the test suite, its devices, and one compilation cache for all of it."""

import dataclasses
import gc
import importlib.metadata
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import shape_checks

GOLDEN = pathlib.Path(__file__).parent / "golden" / "lifecycle.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=pathlib.Path,
        default=GOLDEN,
        metavar="FILE",
        help=f"golden data that tests/test_golden.py compares with (default: {GOLDEN})",
    )


def pytest_configure(config: pytest.Config) -> None:
    # JAX reads the variable when it starts. Four devices are for the tests of several;
    # all others use the first. Compiling is most of the time, and takes a third less
    # with less optimization; tests of bits ask for all of it (FULLY_OPTIMIZED).
    flags = [
        "--xla_force_host_platform_device_count=4",
        "--xla_backend_optimization_level=0",
    ]
    # It takes half as long again with the emitters from before. Later versions, which
    # Python 3.12 tests, have the new ones alone and stop at a flag they don't know.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    for flag in flags:
        name = flag.split("=")[0]
        if name not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = (
                f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
            )
    # Nobody reads the tracebacks in compiled code, and writing them costs time.
    os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
    # What several tests, workers or commands under test need is compiled once. Workers
    # and commands inherit the variables; JAX reads them when it is imported.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="esper-jax-tests-")
        config.add_cleanup(cache.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    shape_checks.install()


def pytest_collection_finish(session: pytest.Session) -> None:
    # Tracing makes many small objects that live on, and a fifth of its time went into
    # looking through them and all that was imported, again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


_MAPS = pathlib.Path("/proc/self/maps")
_MOST_MAPS = 30_000
"""Linux gives a process 65,530 maps, and compiled programs take a few each."""


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs() -> Iterator[None]:
    """Forgets compiled programs between modules before the process is full of them.

    JAX crashes where the system grants no more.
    """
    yield
    if _MAPS.exists() and _MAPS.read_text().count("\n") > _MOST_MAPS:
        import jax  # not before `pytest_configure` has set its variables

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def _no_flags_of_others() -> Iterator[None]:
    """Forgets the providers of flags between modules, which a process has in common."""
    yield
    openfeature = sys.modules.get("openfeature.api")
    if openfeature is not None:
        openfeature.clear_providers()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the Triton kernels what this CPU chooses, in interpret mode."""
    from esper_jax.kernels.blend import registry

    found, missing = registry._found()
    triton = found["triton"]

    def interpreted(s: Any, rows: int) -> Any:
        return triton.prepare(dataclasses.replace(s, interpret=True), rows)

    here = dataclasses.replace(triton, platforms=None, prepare=interpreted)
    monkeypatch.setattr(
        registry, "_found", lambda: ({"triton": here, "xla": found["xla"]}, missing)
    )
