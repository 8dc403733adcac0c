"""The live view, as a terminal and as a file get it."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from esper_jax.growth.reports import LayerReport, TickReport
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Stage
from esper_jax.monitor.live import LiveView

YELLOW, CYAN, DIM = "\x1b[33m", "\x1b[36m", "\x1b[2m"


def report(tick, **layers):
    return TickReport(
        tick=np.int32(tick),
        step=np.int32(8 * tick),
        train_loss=np.float32(0.75),
        loss=np.float32(1.5),
        accuracy=np.float32(0.625),
        reason=np.int8(0),
        replicas_agree=np.True_,
        layers={name: seeds(stages) for name, stages in layers.items()},
    )


def seeds(stages):
    stage = np.array(stages, np.int8)
    zero = np.zeros(len(stages), np.int32)
    return LayerReport(
        outcome=zero,
        source=stage,
        target=zero - 1,
        slot=zero - 1,
        stage=stage,
        alpha=np.zeros(len(stages), np.float32),
        blueprint=np.zeros(len(stages), np.int8),
        epochs=zero.astype(np.uint16),
        errors=zero.astype(np.uint8),
        signals=Signals.unmeasured(),
    )


def event(tick, text):
    return {"tick": tick, "layer": "first", "text": text}


def screen(output):
    """The lines that a terminal shows in the end: obeys carriage returns, and the
    codes that move up and erase a line; drops colours and the cursor's visibility."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|.|\n", output):
        if token == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif token == "\r":
            column = 0
        elif token == "\x1b[2K":
            lines[row] = ""
        elif moved := re.fullmatch(r"\x1b\[(\d*)A", token):
            row = max(0, row - int(moved[1] or 1))
        elif token[0] == "\x1b":
            assert re.fullmatch(r"\x1b\[([\d;]*m|\?25[lh])", token), token
        else:
            lines[row] = lines[row][:column].ljust(column) + token
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Console(
        file=io.StringIO(), force_terminal=True, width=80, color_system="standard"
    )


def test_a_terminal_shows_one_panel(terminal):
    dormant, training, grafting = Stage.DORMANT, Stage.TRAINING, Stage.GRAFTING
    with LiveView(40, terminal) as view:
        view.update(report(1, first=[dormant] * 3, second=[dormant]), [])
        view.update(
            report(2, first=[grafting, training, training], second=[dormant]),
            [event(2, "seed 0: TRAINING -> GRAFTING")],
        )
    output = terminal.file.getvalue()
    shown = screen(output)
    # The panel of tick 2 stands where the first lines stood, and nothing else does.
    assert re.match(r"tick .*2/40", shown[0])
    assert shown[1:] == [
        "tick 2/40  step 16  train loss 0.7500  held-out loss 1.5000  accuracy 0.6250",
        " layer   seeds by stage",
        " first   TRAINING 2  GRAFTING 1",
        " second  DORMANT 1",
        "tick 2: first seed 0: TRAINING -> GRAFTING",
    ]
    assert f"{YELLOW}TRAINING 2" in output
    assert f"{CYAN}GRAFTING 1" in output
    assert f"{DIM}DORMANT 1" in output


def test_a_terminal_shows_the_last_six_lines(terminal):
    with LiveView(40, terminal) as view:
        view.update(report(1, first=[0]), [event(1, f"event {i}") for i in range(5)])
        view.note("a note")
        view.note("[brackets] stay")
        view.update(report(2, first=[0]), [event(2, "event 5")])
    assert screen(terminal.file.getvalue())[-6:] == [
        "tick 1: first event 2",
        "tick 1: first event 3",
        "tick 1: first event 4",
        "a note",
        "[brackets] stay",
        "tick 2: first event 5",
    ]


def test_a_terminal_is_given_back_when_training_fails(terminal):
    def train():
        with LiveView(40, terminal) as view:
            view.update(report(1, first=[0]), [])
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        train()
    output = terminal.file.getvalue()
    hidden, shown = output.rindex("\x1b[?25l"), output.rindex("\x1b[?25h")
    assert hidden < shown  # the cursor
    assert any("accuracy 0.6250" in line for line in screen(output))


def test_a_file_gets_plain_lines():
    console = Console(file=io.StringIO(), width=40)
    with LiveView(5, console, every=2) as view:
        for tick in range(1, 6):
            events = [event(tick, "a [line] that is longer than the console is wide")]
            view.update(report(tick, first=[0, 0, 2]), events if tick == 3 else [])
        view.note("a note")
    losses = "train loss 0.7500  held-out loss 1.5000  accuracy 0.6250"
    assert console.file.getvalue().splitlines() == [
        "compiling the train step and the tick",
        f"tick 2/5  step 16  {losses}",
        "  first: DORMANT 2  TRAINING 1",
        "tick 3: first a [line] that is longer than the console is wide",
        f"tick 4/5  step 32  {losses}",
        "  first: DORMANT 2  TRAINING 1",
        f"tick 5/5  step 40  {losses}",
        "  first: DORMANT 2  TRAINING 1",
        "a note",
    ]
