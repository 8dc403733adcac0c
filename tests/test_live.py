"""The live view, as a terminal and as a file get it."""

import io
import re

import numpy as np
import pytest
import reports
from reports import seeds
from rich.console import Console

from esper_jax.lifecycle.stages import Stage
from esper_jax.monitor.curves import Curve
from esper_jax.monitor.live import LiveView

YELLOW, CYAN, DIM = "\x1b[33m", "\x1b[36m", "\x1b[2m"


def report(tick, layers=None, **named):
    return reports.report(tick, layers or named)


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
    now = iter([0.0, 0.5, 2.0]).__next__
    with LiveView(40, terminal, clock=now) as view:
        view.update(report(1, first=[dormant] * 3, second=[dormant]), [])
        view.update(report(2, first=[dormant] * 3, second=[dormant]), [])
        first = seeds([grafting, training, grafting], alpha=[0.25, 0.0, 1.0])
        third = reports.report(
            3,
            {"first": first, "second": seeds([dormant])},
            loss=0.75,
            train_loss=np.nan,
        )
        view.update(third, [event(3, "seed 0: TRAINING -> GRAFTING")])
    output = terminal.file.getvalue()
    shown = screen(output)
    # The panel of tick 3 stands where the first lines stood, and nothing else does.
    # 16 steps in 2 seconds; 37 ticks are left, of a second each.
    bar = "━" * 2 + "─" * 28
    assert shown == [
        f"tick 3/40  step 24  {bar}  8.0 steps/s  0:00:37 left",
        "train loss          nan  ▁▁!",
        "held-out loss    0.7500  ██▁",
        "accuracy         0.6250  ▁▁▁",
        "first  ▒░█",
        "second ·",
        "DORMANT 1  TRAINING 1  GRAFTING 2",
        "tick 3: first seed 0: TRAINING -> GRAFTING",
    ]
    assert f"{CYAN}▒" in output
    assert f"{YELLOW}░" in output
    assert f"{CYAN}█" in output
    assert f"{DIM}·" in output
    assert f"{YELLOW}TRAINING 1" in output


@pytest.mark.parametrize(("layers", "each"), [(1, 10_000), (50, 200), (3, 100)])
def test_many_seeds_are_summarised_and_nothing_scrolls(terminal, layers, each):
    terminal.height = 24
    stages = [Stage.FOSSILIZED, *[Stage.DORMANT] * (each - 2), Stage.TRAINING]
    alpha = np.zeros(each)
    alpha[0] = 1
    many = {f"blocks/{i}/a_long_name/mlp": seeds(stages, alpha) for i in range(layers)}
    with LiveView(40, terminal) as view:
        events = [event(1, f"{'long ' * 30}{i}") for i in range(9)]
        view.update(report(1, many), events)
    shown = screen(terminal.file.getvalue())
    assert len(shown) <= 23
    assert max(map(len, shown)) <= 77  # and ^C
    assert all(line.endswith("…") for line in shown[-6:])
    text = "\n".join(shown)
    assert f"DORMANT {layers * (each - 2)}" in text
    assert f"FOSSILIZED {layers}" in text
    marks = {mark: sum(line.count(mark) for line in shown) for mark in "·░█"}
    match layers:
        case 1:  # 56 characters in each of the 11 lines that are left
            assert "up to 17 seeds a character" in text
            assert marks == {"·": 587, "░": 1, "█": 1}
        case 50:
            assert "40 more layers" in text
            assert "~/9/a_long_name/mlp" not in text
        case 3:  # a character each
            assert marks["·"] == 3 * 98
            assert "a character" not in text


def test_a_terminal_that_only_knows_ascii_gets_ascii(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    narrow = Console(file=file, force_terminal=True, width=80, color_system=None)
    with LiveView(4, narrow) as view:
        layer = seeds([Stage.DORMANT, Stage.GRAFTING], alpha=[0, 0.5])
        view.update(report(1, first=layer), [event(1, "long " * 30)])
    shown = screen(file.buffer.getvalue().decode("ascii"))
    assert "first .%" in shown
    assert shown[1].endswith("0.7500  _")


def test_a_curve_shows_all_of_a_run_in_bounded_memory():
    curve = Curve(room=8)
    for value in range(1000):
        curve.add(value)
    assert len(curve._points) < 8
    line = curve.line(8)
    assert line[0] == "▁"
    assert line[-1] == "█"
    assert list(line) == sorted(line)
    assert len(curve.line(4)) == 4
    curve.add(np.nan)
    assert curve.line(8)[-1] == "!"
    assert Curve().line(8) == ""
    huge = Curve()
    for value in (-1e308, 1e308, 0.0):
        huge.add(value)
    assert huge.line(8) == "▁▁▁"  # their distance is not finite


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


def test_what_is_told_before_the_panel_stays_above_it(terminal):
    view = LiveView(40, terminal)
    view.note("metrics are at http://127.0.0.1:9464/metrics")
    with view:
        view.update(report(1, first=[0]), [event(1, f"event {i}") for i in range(9)])
    shown = screen(terminal.file.getvalue())
    assert shown[0] == "metrics are at http://127.0.0.1:9464/metrics"
    assert shown[1].startswith("tick 1/40")
    assert len(shown) == 1 + 6 + 6


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
    assert any("accuracy         0.6250" in line for line in screen(output))


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


def test_a_file_gets_one_line_for_many_layers():
    console = Console(file=io.StringIO(), width=40)
    with LiveView(1, console) as view:
        view.update(report(1, {f"layer/{i}": [0, 0, 2] for i in range(13)}), [])
    lines = console.file.getvalue().splitlines()
    assert lines[2:] == ["  13 layers: DORMANT 26  TRAINING 13"]
