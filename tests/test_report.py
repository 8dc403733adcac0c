"""`esper-jax report`: what the page says of a run, and that any records give one."""

import html.parser
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from report_pages import hostile, many_seeds, nothing, written
from rich.console import Console

from esper_jax.cli import main
from esper_jax.lifecycle.looks import LOOKS
from esper_jax.lifecycle.stages import Stage
from esper_jax.monitor import page as package
from esper_jax.monitor.page import axes, page
from esper_jax.monitor.page.lives import seeds_of
from esper_jax.monitor.page.records import Records
from esper_jax.monitor.page.worth import mean_interval, worth_of_fossils
from esper_jax.monitor.words import rules_that_refused
from esper_jax.run import report
from esper_jax.run.config import load_config
from esper_jax.run.folder import RunError, RunFolder
from esper_jax.run.report import read_records, report_run
from esper_jax.run.run import train_run

ROOT = Path(__file__).parents[1]
OLD = ROOT / "tests" / "fixtures" / "run_v0.1_smoke"
VOID = {"meta", "link", "br", "rect", "path", "line", "circle"}


class Checked(html.parser.HTMLParser):
    """Reads a page whose elements must close in order; keeps text by section."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.said = {}
        self._section = "head"
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag == "section":
            self._section = dict(attributes)["id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.said[self._section] = self.said.get(self._section, "") + text + " "


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "smoke"
    train_run(
        load_config(ROOT / "configs" / "smoke.toml"), out, console=Console(quiet=True)
    )
    return out


def test_ticks_hold_alpha_and_worth_of_what_is_on_the_way(smoke):
    found = {}
    for tick in lines(smoke / "ticks.jsonl"):
        for layer, columns in tick.get("seeds", {}).items():
            assert {len(column) for column in columns.values()} == {
                len(columns["seed"])
            }
            for seed, alpha, worth in zip(
                columns["seed"], columns["alpha"], columns["worth"], strict=True
            ):
                found.setdefault((layer, seed), {})[tick["tick"]] = alpha, worth
    moves = {
        (e["layer"], e["seed"], e["to"]): e
        for e in lines(smoke / "events.jsonl")
        if e["outcome"] == "OK"
    }
    for seed in (0, 1):
        place = "layers/0", seed
        grafted = moves[(*place, "GRAFTING")]["tick"]
        ramp = [found[place][grafted + n][0] for n in range(4)]
        assert ramp == [0, 0.25, 0.5, 0.75]  # ramp_duration is 4
        tuned, kept = (
            moves[(*place, to)]["tick"] for to in ("FINE_TUNING", "FOSSILIZED")
        )
        worths = [found[place][tick][1] for tick in range(tuned + 1, kept + 1)]
        said = moves[(*place, "FOSSILIZED")]["measured"]["total_improvement"]
        assert np.mean(worths) == pytest.approx(said, rel=1e-5)
        assert kept + 1 not in found[place]  # a fossil adds nothing
    assert json.loads((smoke / "run.json").read_text())["layers"] == {
        "layers/0": {
            "features": 16,
            "num_seeds": 4,
            "capacity": 2,
            "blueprints": ["residual_mlp"],
        }
    }


def test_the_page_of_a_run_says_what_the_run_did(smoke):
    before = {p: p.read_bytes() for p in smoke.rglob("*") if p.is_file()}
    path = report_run(smoke)
    assert path == smoke / "report.html"
    after = {p: p.read_bytes() for p in smoke.rglob("*") if p.is_file()}
    assert after.keys() - before.keys() == {path}
    assert before.items() <= after.items()
    text = path.read_text()
    said = Checked(text).said
    assert "finished, 40 of 40 ticks" in said["head"]
    summary = json.loads((smoke / "summary.json").read_text())
    assert f"{summary['final_accuracy']:.4g}" in said["result"]
    [low, high] = (
        e["measured"]["total_improvement"]
        for e in summary["events"]
        if e["to"] == "FOSSILIZED"
    )
    for worth in (low, high):
        assert f"{worth:.4g}" in said["fossils"]
    assert "76" in said["fossils"]  # parameters
    assert "152" in said["fossils"]  # operations
    assert "residual_mlp" in said["topology"]
    assert "16 features in 4 chunks (2 DORMANT, 2 FOSSILIZED)" in said["topology"]
    assert re.search(
        r"stability_score at least 0.8\s+EVALUATING → FINE_TUNING\s+2 ",
        said["refusals"],
    )
    assert "controller.patience" in said["config"]
    assert "jaxlib" in said["versions"]
    assert all(e["text"] in said["events"] for e in summary["events"])
    assert "alpha from 0 to 0.75" in text
    report_run(smoke)  # replaces itself
    path.unlink()


def test_a_page_names_no_address(smoke):
    attributes = Checked(page(read_records(RunFolder(smoke)))).attributes
    led = [v for _, name, v in attributes if name in ("href", "src", "xlink:href")]
    assert [v for v in led if not v.startswith("#")] == ["data:,"]


def test_a_run_of_version_0_1_shows_what_it_has(tmp_path):
    out = shutil.copytree(OLD, tmp_path / "old")
    said = Checked(report_run(out).read_text()).said
    assert "Not recorded: this run is of version 0.2" in said["versions"]
    assert "0.002411" in said["fossils"]  # the mean, from the event
    assert "not recorded" in said["fossils"]  # its interval
    assert "16 features in 4 chunks" in said["topology"]


@pytest.mark.parametrize("tail", ['{"tick": 13, "lay', ""])
def test_a_run_that_was_killed_shows_what_it_has(smoke, tmp_path, tail):
    out = shutil.copytree(smoke, tmp_path / "run")
    (out / "summary.json").unlink()
    for name, whole in (("events.jsonl", 4), ("ticks.jsonl", 17)):
        kept = (out / name).read_text().splitlines(keepends=True)[:whole]
        (out / name).write_text("".join(kept) + tail)
    said = Checked(report_run(out).read_text()).said
    assert "Not finished" in said["head"]
    assert "17 of 40 ticks" in said["head"]
    assert "No seed was kept" in said["fossils"]
    assert "2 GERMINATED" not in said["topology"]
    assert "1 GERMINATED, 1 GRAFTING" in said["topology"]


def test_events_that_are_gone_are_taken_from_the_summary(smoke, tmp_path):
    out = shutil.copytree(smoke, tmp_path / "run")
    whole = page(read_records(RunFolder(out)))
    (out / "events.jsonl").unlink()
    assert page(read_records(RunFolder(out))) == whole
    summary = json.loads((out / "summary.json").read_text())
    summary["events"][3] = {"tick": "one"}
    (out / "summary.json").write_text(json.dumps(summary))
    assert "No seed has germinated" in page(read_records(RunFolder(out)))


def test_a_run_of_which_only_the_config_is_there(smoke, tmp_path):
    shutil.copy(smoke / "config.json", tmp_path)
    said = Checked(report_run(tmp_path).read_text()).said
    assert "No tick is recorded" in said["curves"]
    assert "No seed has germinated" in said["timeline"]


@pytest.mark.parametrize("records", [nothing(), hostile(), many_seeds(10_000)])
def test_any_records_give_a_sound_page(records):
    text = page(records)
    checked = Checked(text)
    assert checked.tags.count("script") == 1
    assert not {tag for tag in checked.tags if tag in ("img", "b-d-o", "iframe")}
    assert not [name for _, name, _ in checked.attributes if name.startswith("on")]
    assert "nan" not in re.findall(r'(?:d|x|y|width|style)="([^"]*)"', text)
    assert not re.search(r'="[^"]*\b(?:nan|inf)\b[^"]*"', text.split("<main")[1])
    assert len(text) < 8e6


def test_hostile_names_are_there_as_text():
    text = page(hostile())
    said = Checked(text).said
    assert "<script>alert(1)</script>" in said["timeline"]
    assert "層/0 🌱" in said["timeline"]
    assert "At 2 of 5 ticks the held-out loss was not finite" in said["curves"]
    text.encode("utf-8")  # a half of a character has gone


def test_of_ten_thousand_seeds_the_newest_are_drawn():
    said = Checked(page(many_seeds(10_000))).said
    assert (
        "9\u202f200 of 10\u202f000 seeds that have lived are not drawn"
        in (said["timeline"])
    )
    assert "10\u202f000 features in 10\u202f000 chunks" in said["topology"]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)
EVENTS = st.fixed_dictionaries(
    {
        "tick": st.integers(-3, 60),
        "layer": st.text(),
        "seed": st.integers(-1, 4),
        "from": st.text(),
        "to": st.sampled_from([*Stage.__members__, "X"]),
        "outcome": st.sampled_from(["OK", "GATE", "NEW"]),
    },
    optional={"slot": JSON, "measured": JSON, "text": JSON},
)
TICKS = st.fixed_dictionaries(
    {"tick": st.integers(0, 60)},
    optional={
        "loss": JSON,
        "accuracy": JSON,
        "train_loss": JSON,
        "seeds": JSON
        | st.dictionaries(
            st.text(),
            st.dictionaries(st.sampled_from(["seed", "alpha", "worth"]), JSON),
        ),
    },
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(EVENTS, max_size=12),
    st.lists(TICKS, max_size=5),
    st.dictionaries(st.sampled_from(["static", "final_loss", "controller"]), JSON),
    st.dictionaries(st.sampled_from(["growth", "model", "train"]), JSON),
)
def test_records_that_hold_anything_give_a_sound_page(events, ticks, summary, config):
    Checked(
        page(
            Records(
                name="any", events=events, ticks=ticks, summary=summary, config=config
            )
        )
    )


def esper(*arguments, patch):
    patch.setattr(sys, "argv", ["esper-jax", *map(str, arguments)])
    try:
        main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_the_command_writes_where_it_is_told(tmp_path, monkeypatch, capsys):
    out = written(tmp_path / "run", nothing())
    page = tmp_path / "page of a run.html"
    assert esper("report", out, "--out", page, patch=monkeypatch) == 0
    assert capsys.readouterr().out == f"report: {page}\n"
    assert page.read_text().startswith("<!doctype html>")
    assert not (out / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}"], "holds no run (there is no config.json)"),
        (["{tmp}/none"], "holds no run (there is no config.json)"),
        (["{run}", "--out", "{run}/events.jsonl"], "exists and is no report: choose"),
        (["{run}", "--out", "{run}"], "exists and is no report: choose"),
        (["{run}", "--out", "{tmp}/none/page.html"], "none is no folder; make it"),
        (["{damaged}"], "ticks.jsonl is damaged in line 1: it has no tick of type int"),
        (["{summary}"], "summary.json is damaged: it is no JSON object"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(
    arguments, message, tmp_path, monkeypatch, capsys
):
    folders = {
        name: written(tmp_path / name, nothing())
        for name in ("run", "damaged", "summary")
    }
    (folders["damaged"] / "ticks.jsonl").write_text('{"tick": "one"}\n')
    (folders["summary"] / "summary.json").write_text("[]")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    asked = [a.format(tmp=tmp_path, **folders) for a in arguments]
    assert esper("report", *asked, patch=monkeypatch) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_a_page_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    out = written(tmp_path / "run", nothing())
    old = report_run(out).read_bytes()
    monkeypatch.setattr(
        report.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space"))
    )
    with pytest.raises(RunError, match=r"report.html cannot be written: No space"):
        report_run(out)
    assert (out / "report.html").read_bytes() == old
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_the_interval_is_student_s_where_ticks_are_not_correlated():
    values = [3.0, 1.0, 2.0, 5.0, 1.5, 4.0]
    away = np.array(values) - np.mean(values)
    assert away[1:] @ away[:-1] < 0
    expected = scipy.stats.t.interval(
        0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values)
    )
    assert mean_interval(values) == pytest.approx(expected)
    assert mean_interval([1.0]) is None
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_the_interval_holds_the_mean_of_a_correlated_series_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2000, 40))
    series = np.zeros_like(noise)
    series[:, 0] = noise[:, 0] / np.sqrt(1 - 0.6**2)
    for n in range(1, noise.shape[1]):
        series[:, n] = 0.6 * series[:, n - 1] + noise[:, n]
    ends = np.array([mean_interval(list(row)) for row in series])
    plain = scipy.stats.t.interval(
        0.95, 39, series.mean(axis=1), scipy.stats.sem(series, axis=1)
    )
    holds = np.mean((ends[:, 0] <= 0) & (ends[:, 1] >= 0))
    naive = np.mean((plain[0] <= 0) & (plain[1] >= 0))
    assert naive < 0.75  # what the correction is for
    assert 0.88 < holds < 0.98


def test_rules_are_read_from_what_was_said():
    assert rules_that_refused(
        "seed 1 stays in EVALUATING: performance_delta was not measured, "
        "stability_score 0.737 is not at least 0.8"
    ) == ["performance_delta measured", "stability_score at least 0.8"]
    assert rules_that_refused("seed 2 stays in TRAINING: no slot is free") == []


def test_a_seed_that_lives_again_is_told_by_its_last_life():
    def event(tick, to):
        moved = {"tick": tick, "layer": "a", "seed": 0, "slot": 1, "from": ""}
        return {**moved, "to": to, "outcome": "OK", "measured": {}}

    row = {"seed": [0], "alpha": [1.0], "worth": [0.5], "blueprint": [2]}
    stages = "GERMINATED TRAINING CULLED DORMANT GERMINATED FINE_TUNING FOSSILIZED"
    [seed] = seeds_of(
        Records(
            name="",
            events=[event(t, to) for t, to in enumerate(stages.split(), 1)],
            ticks=[
                {"tick": 2, "seeds": {"a": {**row, "blueprint": [1]}}},
                {"tick": 7, "seeds": {"a": row}},
            ],
        )
    )
    assert [s.stage.name for s in seed.spans] == stages.replace("DORMANT ", "").split()
    assert [(s.start, s.end) for s in seed.life] == [(5, 6), (6, 7), (7, 7)]
    assert (seed.blueprint, seed.slot, seed.lives) == (2, 1, True)
    [worth] = worth_of_fossils(Records(name=""), [seed])
    assert (worth.mean, worth.low, worth.ticks) == (0.5, None, 1)


def test_the_work_on_a_seed_grows_with_what_is_known_of_it():
    class Tick(int):
        compared = 0

        def _counted(compare):
            def counted(self, other):
                Tick.compared += 1
                return compare(self, other)

            return counted

        __lt__, __le__, __gt__, __ge__ = map(
            _counted, (int.__lt__, int.__le__, int.__gt__, int.__ge__)
        )
        del _counted

    last = 400
    entry = {"layer": "a", "seed": 0, "from": "", "outcome": "OK"}
    stages = ("GERMINATED", "CANCELLED")
    row = {"seed": [0], "alpha": [0.0], "worth": [None], "blueprint": [0]}
    [seed] = seeds_of(
        Records(
            name="",
            events=[
                {**entry, "tick": Tick(t), "to": stages[t % 2]} for t in range(last)
            ],
            # In the order of a file that somebody has put together.
            ticks=[{"tick": Tick(t), "seeds": {"a": row}} for t in range(last)[::-1]],
        )
    )
    assert [[m.tick for m in s.measured] for s in seed.spans[:2]] == [[0, 1], [1, 2]]
    assert Tick.compared < 40 * last  # a look at all for each stage is 400 * last


def test_scales_hold_their_values():
    for values in ([], [0.0], [1e-12], [5, 5], [-1e308, 1e308], [1e-320, 1e300], [3]):
        scale = axes.scale_of(values)
        places = [scale.place(value) for value in values]
        assert all(0 <= p <= 1 for p in places)
        assert places == sorted(places)
        assert all(scale.low <= v <= scale.high for v, _ in scale.marks())
    wave = [(t, float(np.sin(t / 50))) for t in range(100_000)]
    thin = axes.thinned(wave)
    assert len(thin) <= 2 * axes.MOST_POINTS
    assert max(v for _, v in thin) == max(v for _, v in wave)


def test_colours_of_text_can_be_read():
    style = (Path(package.__file__).parent / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\n *\}", style, re.DOTALL)
    )
    for colours in (light, {**light, **dark}):
        for ink in ("ink", "dim", "accent", "train", "static", "kept", "back"):
            assert _contrast(colours[ink], colours["paper"]) >= 4.5, ink
        assert _contrast(colours["dim"], colours["panel"]) >= 4.5
    looks = {stage: LOOKS[stage] for stage in Stage if stage != Stage.DORMANT}
    assert len({look.colour for look in looks.values()}) == 8  # what has ended is one
    assert len({look.sign for look in LOOKS.values()}) == len(Stage)
    assert all(_contrast(x.colour, x.ink) >= 4.5 for x in looks.values())


def _contrast(one, other):
    """Of WCAG 2.2, from 1 to 21."""

    def luminance(colour):
        parts = np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)]) / 255
        linear = np.where(
            parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4
        )
        return linear @ [0.2126, 0.7152, 0.0722]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
