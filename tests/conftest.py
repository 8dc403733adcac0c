"""Options of the test suite."""

import pathlib

import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden" / "lifecycle.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=pathlib.Path,
        default=GOLDEN,
        metavar="FILE",
        help=f"golden data that tests/test_golden.py compares with (default: {GOLDEN})",
    )
