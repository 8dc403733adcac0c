"""Chunks: every feature in one chunk, and nothing lost on the way there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_jax.chunks import ChunkLayout


@st.composite
def layouts(draw: st.DrawFn, most: int = 12) -> ChunkLayout:
    features = draw(st.integers(1, most))
    return ChunkLayout(features, draw(st.integers(1, features)))


@given(layouts(most=300))
def test_chunks_cover_the_features_in_order_without_gaps(layout: ChunkLayout) -> None:
    f, s = layout.features, layout.num_seeds
    assert list(layout.sizes) == [f // s + (i < f % s) for i in range(s)]
    ranges = [range(a, a + n) for a, n in zip(layout.starts, layout.sizes, strict=True)]
    assert [i for r in ranges for i in r] == list(range(f))
    assert [layout.owners[i] for i in range(f)] == [
        seed for seed, r in enumerate(ranges) for _ in r
    ]
    assert layout.width == max(layout.sizes)
    assert layout.even == (len(set(layout.sizes)) == 1)
    # Equal layouts are one static argument.
    assert hash(layout) == hash(ChunkLayout(f, s))
    assert layout == ChunkLayout(np.int64(f), np.int32(s))  # type: ignore[arg-type]


# Each shape is compiled: one chunk, one for each feature, even, uneven by one and by
# several.
FEW = st.sampled_from(
    [ChunkLayout(*of) for of in ((1, 1), (5, 5), (12, 4), (7, 2), (11, 4))]
)


@given(FEW, st.sampled_from([(), (2,), (2, 0), (1, 3)]))
@settings(max_examples=12, deadline=None)
def test_split_and_merge_are_inverse(
    layout: ChunkLayout, batch: tuple[int, ...]
) -> None:
    y = 1.0 + np.arange(int(np.prod(batch)) * layout.features, dtype=np.float32)
    y = y.reshape(*batch, layout.features)
    chunks = np.asarray(layout.split(jnp.asarray(y)))
    assert chunks.shape == (*batch, layout.num_seeds, layout.width)
    for seed, (start, size) in enumerate(zip(layout.starts, layout.sizes, strict=True)):
        np.testing.assert_array_equal(
            chunks[..., seed, :size], y[..., start : start + size]
        )
        assert not np.any(chunks[..., seed, size:])
    np.testing.assert_array_equal(layout.merge(jnp.asarray(chunks)), y)


@given(FEW, st.data())
@settings(max_examples=12, deadline=None)
def test_gather_reads_and_scatter_writes_the_chunks_named(
    layout: ChunkLayout, data: st.DataObject
) -> None:
    slots = 4
    order = data.draw(st.permutations(range(layout.num_seeds)))
    free = data.draw(st.lists(st.booleans(), min_size=slots, max_size=slots))
    owned = iter(order)
    seeds = np.array([-1 if f else next(owned, -1) for f in free], np.int32)
    y = np.arange(1.0, 1 + 2 * layout.features, dtype=np.float32).reshape(2, -1)

    chunks = np.asarray(layout.gather(jnp.asarray(y), jnp.asarray(seeds)))
    assert chunks.shape == (2, slots, layout.width)
    new = -100.0 - np.arange(chunks.size, dtype=np.float32).reshape(chunks.shape)
    expected = y.copy()
    for k, seed in enumerate(seeds):
        if seed < 0:
            assert not np.any(chunks[:, k])
            continue
        size, start = layout.sizes[seed], layout.starts[seed]
        columns = slice(start, start + size)
        np.testing.assert_array_equal(chunks[:, k, :size], y[:, columns])
        assert not np.any(chunks[:, k, size:])
        expected[:, columns] = new[:, k, :size]
    arrays = [jnp.asarray(x) for x in (y, seeds, new)]
    np.testing.assert_array_equal(layout.scatter(*arrays), expected)
    # What was gathered can be put back without a trace.
    back = layout.scatter(arrays[0], arrays[1], jnp.asarray(chunks))
    np.testing.assert_array_equal(back, y)


@pytest.mark.parametrize("layout", [ChunkLayout(12, 4), ChunkLayout(13, 4)])
def test_which_chunks_is_a_run_time_value(layout: ChunkLayout) -> None:
    gather = jax.jit(layout.gather)
    for seeds in ([0, 1], [3, -1], [-1, -1]):
        gather(jnp.ones((2, layout.features)), jnp.asarray(seeds))
    assert gather._cache_size() == 1


@pytest.mark.parametrize(
    ("features", "num_seeds", "error", "match"),
    [
        (0, 1, ValueError, "features must be at least 1, got 0"),
        (8, 0, ValueError, "num_seeds must be from 1 to the number of features"),
        (8, 9, ValueError, r"num_seeds .* \(8\).*got 9"),
        (8.0, 2, TypeError, "features must be an integer, got 8.0"),
        (8, "2", TypeError, "num_seeds must be an integer, got '2'"),
        (True, 1, TypeError, "features must be an integer"),
    ],
)
def test_impossible_layouts_are_refused(
    features: int, num_seeds: int, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        ChunkLayout(features, num_seeds)
