"""An iterator's position is in checkpoints: a resumed run sees the same batches."""

import importlib.util
import itertools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax.checkpoint import CheckpointError
from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.hosts import MLP
from esper_jax.train import Passes, build, fit
from esper_jax.trees import state_hash

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4)).astype(np.float32)
Y = RNG.integers(0, 3, size=40).astype(np.int32)
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 40, 8)]
TICKS, STOPPED, STEPS = 5, 2, 3
"""The run is stopped in the middle of a pass: 6 of 5 + 5 batches."""


class Endless:
    """An iterator of one's own: draws rows, and knows how often it has."""

    def __init__(self, state=None):
        self.drawn = 0
        self._convert = state or (lambda n: {"drawn": n, "more": [1, "text", b"\x00"]})

    def __iter__(self):
        return self

    def __next__(self):
        rows = np.random.default_rng(self.drawn).permutation(40)[:8]
        self.drawn += 1
        return X[rows], Y[rows]

    def get_state(self):
        return self._convert(self.drawn)

    def set_state(self, state):
        self.drawn = state["drawn"]
        assert state == self.get_state()


def drawn_again():
    """A function that returns a generator for each pass."""
    return (BATCHES[i] for i in (3, 1, 4, 0, 2))


def grain_dataset():
    import grain

    rows = grain.MapDataset.range(40).shuffle(seed=0).repeat(None)
    batches = rows.map(lambda i: (X[i], Y[i])).batch(8)
    return iter(batches.to_iter_dataset())


def grain_loader():
    """Its iterator's state is bytes; a pass has an end."""
    import grain

    class Rows(grain.transforms.Map):
        def map(self, i):
            return X[i], Y[i]

    return grain.DataLoader(
        data_source=range(40),
        sampler=grain.samplers.IndexSampler(40, shuffle=True, seed=0, num_epochs=1),
        operations=[Rows(), grain.transforms.Batch(8)],
    )


needs_grain = pytest.mark.skipif(
    importlib.util.find_spec("grain") is None,
    reason="grain is not installed: pip install 'esper-jax[data]'",
)
KINDS = {
    "an iterator of one's own": Endless,
    "passes of a list": lambda: Passes(BATCHES),
    "passes of a function": lambda: Passes(drawn_again),
    "grain's dataset": grain_dataset,
    "passes of grain's loader": lambda: Passes(grain_loader()),
}


@pytest.fixture(scope="module")
def program():
    sgd = optax.sgd(0.1)
    return build(MLP(4, (8,), 3, num_seeds=2, rngs=nnx.Rngs(0)), sgd, sgd)


def start(program):
    return program.init(jax.random.key(0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of grain's own
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(name, marks=needs_grain if "grain" in name else ())
        for name in KINDS
    ],
)
def test_a_resumed_run_sees_the_batches_of_one_that_never_stopped(
    kind, program, tmp_path, caplog
):
    def run(state, data, ticks, **options):
        return fit(
            program, state, data, (X, Y), ticks=ticks, steps_per_tick=STEPS, **options
        )

    whole = state_hash(run(start(program), KINDS[kind](), TICKS))
    with Checkpointer(tmp_path) as checkpoints:
        data = KINDS[kind]()

        def save(state, report):
            checkpoints.save(int(state.step), state, data=data)

        run(start(program), data, STOPPED, on_tick=save)
    data = KINDS[kind]()
    found = Checkpointer(tmp_path).restore(start(program), data=data)
    assert found.step == STOPPED * STEPS
    assert state_hash(run(found.state, data, TICKS)) == whole
    assert not caplog.records
    # It is the position that does it.
    found = Checkpointer(tmp_path).restore(start(program))
    assert state_hash(run(found.state, KINDS[kind](), TICKS)) != whole


def test_a_generator_is_said_to_have_no_position(tmp_path, caplog):
    state, data = {"x": X}, itertools.cycle(BATCHES)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, data=data)
        checkpoints.save(2, state, data=data)
        assert checkpoints.restore(state, data=data).step == 2
    said = [record.message for record in caplog.records]
    assert [text.split(":")[0] for text in said] == [
        "data (cycle) has no get_state and set_state, so checkpoints do not hold its "
        "position",
        "step 2 has no position of data, which goes on as it is",
    ]


def test_a_position_that_cannot_be_used_is_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        odd = Endless(lambda n: {"rows": X})
        with pytest.raises(CheckpointError, match=r"data\.get_state\(\) must return"):
            checkpoints.save(1, {"x": X}, data=odd)
        assert not checkpoints.steps()
        checkpoints.save(1, {"x": X}, data=Endless(lambda n: {"other": n}))
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"cannot go to the position.*drawn"):
            checkpoints.restore({"x": X}, data=Endless())


def test_passes_refuse_an_iterator_which_has_only_one():
    with pytest.raises(TypeError, match="data must begin anew for each pass"):
        Passes(iter(BATCHES))
    assert list(itertools.islice(Passes([]), 3)) == []
    passes = Passes(BATCHES)
    before = passes.get_state()
    first = next(passes)
    passes.set_state(before)
    assert next(passes) is first


class SaysOnly:
    """An iterator that says where it is, and cannot go there."""

    def __init__(self):
        self.batches = iter(BATCHES)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.batches)

    def get_state(self):
        return {"secret": 1}


def test_an_iterator_that_cannot_be_sent_is_read_again():
    passes = Passes(SaysOnly)
    for _ in range(len(BATCHES) + 2):
        next(passes)
    state = passes.get_state()
    assert state == {"pass": 2, "done": 2, "own": None}
    after = next(passes)
    # An earlier version saved what such an iterator said.
    for saved in (state, state | {"own": {"secret": 1}}):
        again = Passes(SaysOnly)
        again.set_state(saved)
        assert next(again) is after
