"""Fixtures of the test suite."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns the checks of ``--jaxtyping-packages`` off in a test of our own errors."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
