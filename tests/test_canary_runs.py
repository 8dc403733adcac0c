"""The canary of real models with injected faults, and its command line."""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from esper_jax.cli import main
from esper_jax.data import digits
from esper_jax.rollout import Canary, FlagDial, FlagFile, Observer, Plan, decide
from esper_jax.rollout.canary.runs import arm_of, observation_of
from esper_jax.run.config import load_config
from esper_jax.run.folder import RunError
from esper_jax.run.run import train_run

SMOKE = Path(__file__).parents[1] / "configs" / "smoke.toml"
OLD_RUN = Path(__file__).parent / "fixtures" / "run_v0.1_smoke"
FLAGS = """# flags of these tests
[chunked_layers]
rollout_percentage = 0

[growth]
enabled = true
"""
PLAN = Plan(
    percents=(5, 25, 100),
    watch=60.0,
    error_increase=0.25,
    latency_ratio=1.2,
    accuracy_drop=0.08,
    accuracy_spread=0.2,
)


@jax.jit
def train_fleet(params, rows, rates, data, held_out):
    """Trains a small network for each model; returns losses and held-out accuracies."""
    (x, y), (x_test, y_test) = data, held_out

    def logits(params, x):
        return jnp.maximum(x @ params["hidden"], 0) @ params["out"]

    def loss_of(params, x, y):
        return -jnp.mean(jax.nn.log_softmax(logits(params, x))[jnp.arange(len(y)), y])

    def one(params, rows, rate):
        def step(params, take):
            loss, slopes = jax.value_and_grad(loss_of)(params, x[take], y[take])
            return jax.tree.map(lambda p, g: p - rate * g, params, slopes), loss

        params, losses = jax.lax.scan(step, params, rows)
        return losses[-1], jnp.mean(jnp.argmax(logits(params, x_test), -1) == y_test)

    return jax.vmap(one)(params, rows, rates)


FAULTS = {"none": 0.5, "nan": 1e30, "less accurate": 0.15, "slow": 0.5, "raising": 0.5}
"""Learning rate of a candidate with each fault."""


@pytest.fixture(scope="module")
def fleet():
    """Trains the models of some ids; of those with the flag, as its code would."""
    whole = digits()
    data = jax.tree.map(jnp.asarray, (tuple(whole.train), tuple(whole.held_out)))

    def train(fault, on, numbers, rng):
        params = {
            name: 0.2 * rng.standard_normal((len(on), *shape), np.float32)
            for name, shape in (("hidden", (64, 16)), ("out", (16, 10)))
        }
        rows = rng.integers(0, len(whole.train[0]), (len(on), 20, 32))
        # One in ten only: the other runs of a broken version are sound.
        hit = on & ((numbers % 10 == 0) | (fault != "nan"))
        rates = np.where(hit, FAULTS[fault], 0.5).astype(np.float32)
        losses, accuracies = train_fleet(params, rows, rates, *data)
        return np.asarray(losses), np.asarray(accuracies)

    return train


def run_of(fault, on, number, loss, accuracy, rng):
    """What a run says of itself when it has ended.

    Raises:
      RuntimeError: if its code is broken.
    """
    if on and fault == "raising" and number % 3 == 0:
        raise RuntimeError("a broken version")
    seconds = float(rng.lognormal(0.0, 0.1)) * (1.2 if on and fault == "slow" else 1)
    return {"loss": float(loss), "accuracy": float(accuracy), "latency": seconds}


@pytest.mark.parametrize(
    ("fault", "trigger"),
    [
        ("none", ""),
        ("nan", "nan: in "),
        ("less accurate", "accuracy 0."),
        ("slow", "latency 1."),
        ("raising", "error 0."),
    ],
)
def test_a_fleet_of_models_with_a_fault_is_rolled_back(fault, trigger, fleet, tmp_path):
    file = tmp_path / "flags.toml"
    file.write_text(FLAGS)
    dial, rng = FlagDial("chunked_layers", file), np.random.default_rng(7)
    percents = []
    with (
        Canary.start(tmp_path / "canary", dial, PLAN, now=0.0) as canary,
        Observer(canary.report().observations) as observer,
    ):
        for look in range(1, 40):
            flag = FlagFile(file).read()["chunked_layers"]
            percents.append(flag.rollout_percentage)
            numbers = np.arange(600 * look, 600 * (look + 1))
            ids = [f"model-{number}" for number in numbers]
            on = np.array([decide(flag, model_id).on for model_id in ids])
            losses, accuracies = fleet(fault, on, numbers, rng)
            for i, model_id in enumerate(ids):
                arm = "candidate" if on[i] else "baseline"
                of_run = (numbers[i], losses[i], accuracies[i])
                try:
                    seen = run_of(fault, on[i], *of_run, rng)
                    observer.observe(arm, error=False, model_id=model_id, **seen)
                except RuntimeError:
                    observer.observe(arm, error=True, model_id=model_id)
            action = canary.step(now=60.0 * look)
            if action.kind in ("finish", "roll back"):
                break
        status = canary.report().state.status
    assert action.reason.startswith(trigger)
    if fault == "none":
        assert (status, dial.percentage()) == ("finished", 100)
        assert sorted(set(percents)) == [5, 25, 100]
    else:
        assert (status, dial.percentage()) == ("rolled back", 0)
        assert max(percents) <= 25
    assert file.read_text().startswith("# flags of these tests\n")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command line in a folder with flags; returns status, output and errors."""
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/features.toml").write_text(FLAGS)

    def run(line):
        monkeypatch.setattr(sys, "argv", ["esper-jax", *line.split()])
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


START = (
    "canary start chunked_layers c --percents 10 50 --watch 0.001s "
    "--latency-ratio None --accuracy-drop None --error-increase 0.3 --nan-rate 0.5"
)


def record(number, error=0):
    with Observer("c/observations.jsonl") as observer:
        for i in range(number):
            observer.observe("baseline", error=False)
            observer.observe("candidate", error=i < error)


def percentage():
    return FlagDial("chunked_layers", "configs/features.toml").percentage()


def test_the_command_advances_a_flag_and_rolls_it_back(command):
    status, out, _ = command(START)
    assert (status, percentage()) == (0, 10)
    assert out.startswith("chunked_layers: 0% -> 10%\n")
    assert command("canary status c")[1].splitlines()[3:] == [
        "  error: nothing compared yet",
        "  last: start: the first stage begins",
    ]
    record(200)
    status, out, err = command("canary step c")
    assert (status, err, percentage()) == (0, "", 50)
    assert out.startswith("chunked_layers at 50%: advance: 200 of the candidate's obs")
    # Where it goes on by itself, it ends with the canary.
    record(50, error=40)
    status, out, _ = command("canary step c --every 60s")
    assert (status, percentage()) == (1, 0)
    assert out.startswith("chunked_layers at 0%: roll back: error 0.8 against 0; evid")
    status, out, _ = command("canary status c")
    assert status == 0
    assert "rolled back, 0%\n  it came to 50% of 10, 50%\n" in out
    assert re.search(
        r"  error 0.8 against 0; harm .* of 40, clear .* of 20, 50 of", out
    )
    status, _, err = command("canary step c")
    assert status == 2
    assert err.startswith("esper-jax: this canary is over (rolled back): start anoth")


def test_the_command_says_what_to_do_about_wrong_input(command):
    for line, message in (
        (
            START.replace("chunked_layers", "chunked"),
            "has no flag 'chunked'; it has",
        ),
        (
            START.replace("chunked_layers", "growth"),
            "growth is at 100%: expected less than the first stage, 10%; turn it d",
        ),
        (
            START.replace("10 50", "50 10"),
            "expected each above the one before",
        ),
        (START.replace("10 50", ""), "percents: expected at least one stage such as"),
        (START.replace("10 50", "0 101"), "above 0 and up to 100, got 0"),
        (START.replace("0.001s", "soon"), "--watch: expected a time such as 90s, 10m"),
        (START + " --patience -1h", "--patience: expected a time such as"),
        (START + " --file none.toml", "there is no such file of flags"),
        ("canary status c", "c: holds no canary; begin one with esper-jax canary st"),
        ("canary step c", "c: holds no canary; begin one with esper-jax canary st"),
    ):
        status, _, err = command(line)
        assert status == 2, line
        assert message in err, line
        assert not Path("c").exists()
    assert percentage() == 0
    command(START)
    with Observer("c/observations.jsonl") as observer:
        observer.observe("candidate", loss=1.0)
        observer.observe("baseline", error=False)
    status, _, err = command("canary step c")
    assert status == 2
    assert "stays at 10%: the trigger error watches nothing: none of 1 obse" in err
    FlagFile("configs/features.toml").roll_out("chunked_layers", 99)
    status, out, _ = command("canary status c")
    assert "  the flag is at 99%: somebody else turned it" in out
    status, _, err = command("canary step c")
    assert status == 2
    assert "is at 99%, but its canary left it at 10%" in err
    assert command("canary resume c")[1].startswith("chunked_layers was turned back to")
    assert percentage() == 10
    FlagFile("configs/features.toml").change("chunked_layers", enabled=True)
    status, out, _ = command("canary status c")
    assert status == 0
    assert "  the flag is at 100%: somebody else turned it" in out
    assert "esper-jax canary resume turns it back" in command("canary step c")[2]
    command("canary resume c")
    assert percentage() == 10
    assert command("canary resume c")[1].startswith("nothing was left half done")
    status, out, _ = command("canary abort c --reason enough")
    assert (status, out) == (0, "chunked_layers at 0%: abort: enough\n")
    assert percentage() == 0


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def sound(tmp_path):
    """A run of version 0.1, with what later versions write beside it."""
    folder = tmp_path / "sound"
    folder.mkdir()
    for name in ("ticks.jsonl", "summary.json"):
        (folder / name).write_bytes((OLD_RUN / name).read_bytes())
    config = json.loads((OLD_RUN / "config.json").read_text())
    config["features"] = {"chunked_layers": True}
    (folder / "config.json").write_text(json.dumps(config))
    seconds = [9.0, 0.5, None, 0.1, 0.2]  # the first tick compiles
    lines = [json.dumps({"esper_step_seconds": each}) + "\n" for each in seconds]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.slow
def test_a_sound_run_is_observed_with_its_feature_its_time_and_its_accuracy(tmp_path):
    config = load_config(SMOKE, ["train.ticks=3", "checkpoint.every=3"])
    summary = train_run(config, tmp_path / "run", console=Console(quiet=True))
    arm = arm_of(tmp_path / "run", "chunked_layers")
    metrics = lines_of(tmp_path / "run" / "metrics.jsonl")
    seconds = [line["esper_step_seconds"] for line in metrics]
    assert observation_of(tmp_path / "run", arm) == {
        "arm": "candidate",
        "run": str(tmp_path / "run"),
        "error": False,
        "latency": np.median(seconds[1:]),
        "accuracy": summary["final_accuracy"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("governor", ["true", "false"])
def test_a_run_whose_loss_is_nan_says_so(governor, tmp_path):
    sets = ["train.learning_rate=1e38", f"governor.enabled={governor}", "train.ticks=3"]
    sets.append("features.chunked_layers=false")
    try:
        train_run(
            load_config(SMOKE, sets), tmp_path / "run", console=Console(quiet=True)
        )
    except RunError:  # the governor stops it
        assert governor == "true"
    arm = arm_of(tmp_path / "run", "chunked_layers")
    assert arm == "baseline"
    seen = observation_of(tmp_path / "run", arm)
    assert seen["nan"]
    assert seen["error"] == (governor == "true")


def test_runs_are_observed_once_when_they_are_over(sound, command, tmp_path):
    command(START)
    status, out, err = command(f"canary observe c {sound}")
    assert (status, err) == (0, "")
    rows = lines_of("c/observations.jsonl")
    summary = json.loads((sound / "summary.json").read_text())
    assert rows[0] == {
        "time": rows[0]["time"],
        "arm": "candidate",
        "run": str(sound),
        "error": False,
        "latency": 0.2,
        "accuracy": summary["final_accuracy"],
    }
    assert "sound: candidate: error False, latency" in out
    assert "was observed before" in command(f"canary observe c {sound}")[1]
    # A run that goes on, and what it is when it has failed.
    going = tmp_path / "going"
    going.mkdir()
    for name in ("config.json", "ticks.jsonl"):
        (going / name).write_bytes((sound / name).read_bytes())
    assert command("canary observe c going")[1] == "going: goes on\n"
    rollback = {"number": 1, "failed_tick": 2, "tick": 1, "fault": "JUMP", "text": ""}
    (going / "rollbacks.jsonl").write_text(json.dumps(rollback) + "\n")
    assert command("canary observe c going")[1] == "going: goes on\n"
    (going / "summary.json").write_text("{}")
    _, out, _ = command("canary observe c going --arm baseline")
    assert out == "going: baseline: error True\n"
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / "config.json").write_bytes((sound / "config.json").read_bytes())
    _, out, _ = command("canary observe c failed --failed")
    assert out == "failed: candidate: error True\n"
    for line, message in (
        ("canary observe c nowhere", "nowhere holds no run"),
        ("canary observe c", "RUN: expected the folder of a run at least"),
        ("canary observe d failed", "d: holds no canary"),
    ):
        status, _, err = command(line)
        assert status == 2
        assert message in err
    # A NaN in a run of the candidate rolls back, also before the run is over.
    with (going / "ticks.jsonl").open("a") as file:
        file.write('{"tick": 4, "train_loss": null, "loss": 1.0, "accuracy": 0.5}\n')
    (going / "summary.json").unlink()
    (going / "rollbacks.jsonl").unlink()
    Path("going").rename("later")
    assert command("canary observe c later")[1].startswith("later: candidate: nan True")
    status, out, _ = command("canary step c")
    assert (status, percentage()) == (1, 0)
    assert "roll back: nan: in 1 of the candidate's observations" in out
