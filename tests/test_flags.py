"""Flags: what a file says of a model, how it is changed, what OpenFeature is told."""

import concurrent.futures
import json
import os
import stat
from pathlib import Path

import pytest

from esper_jax.rollout import Flag, FlagError, FlagFile, bucket, decide

GOLDEN = json.loads((Path(__file__).parent / "golden" / "lifecycle.json").read_text())

COMMENTED = """\
# Flags of the house.

[growth]            # may grow
enabled = true      # for all, so far
rollout_percentage = 0
allowlist = [ "a",  # the probe
  "b" ]

[own_thing]
rollout_percentage = 5 # five
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "features.toml"
    path.write_text(COMMENTED)
    return FlagFile(path)


def test_every_row_of_the_golden_data_is_decided_alike():
    rows = GOLDEN["flags"]
    wrong = [
        row
        for row in rows
        if decide(Flag(**row["flag"]), row["model_id"]).on != row["enabled"]
    ]
    assert len(rows) == 100
    assert not wrong


def test_reasons_are_those_of_openfeature_in_the_order_of_the_lists():
    both = Flag(enabled=True, allowlist=("m",), blocklist=("m",))
    assert decide(both, "m") == (False, "TARGETING_MATCH")
    assert decide(Flag(allowlist=("m",)), "m") == (True, "TARGETING_MATCH")
    assert decide(Flag(enabled=True, rollout_percentage=1), "m") == (True, "STATIC")
    assert decide(Flag(), "m") == (False, "DISABLED")
    assert decide(Flag(rollout_percentage=100), None) == (False, "DEFAULT")
    # SHA-256 of "m66" is 21 modulo 100: `printf m66 | sha256sum`, as a number.
    assert bucket("m66") == 21
    assert decide(Flag(rollout_percentage=21), "m66") == (False, "SPLIT")
    assert decide(Flag(rollout_percentage=22), "m66") == (True, "SPLIT")


def test_a_percentage_is_that_share_of_many_ids():
    ids = [f"model-{n}" for n in range(20_000)]
    share = sum(decide(Flag(rollout_percentage=25), i).on for i in ids) / len(ids)
    assert share == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / len(ids)) ** 0.5)


def test_a_change_keeps_comments_and_all_other_keys(file):
    assert file.roll_out("growth", 10).rollout_percentage == 10
    file.change("own_thing", blocklist=["z"])
    file.change("grafting_strategies", enabled=True, value="momentum")
    expected = COMMENTED.replace("enabled = true ", "enabled = false ")
    expected = expected.replace("percentage = 0", "percentage = 10")
    expected += 'blocklist = ["z"]\n\n[grafting_strategies]\nenabled = true\n'
    assert file.path.read_text() == expected + 'value = "momentum"\n'
    assert file.read() == {
        "growth": Flag(rollout_percentage=10, allowlist=("a", "b")),
        "own_thing": Flag(rollout_percentage=5, blocklist=("z",)),
        "grafting_strategies": Flag(enabled=True, value="momentum"),
    }


@pytest.mark.parametrize(
    ("text", "after"),
    [
        (
            "\ufeff[a]\r\nenabled=true # x\r\n",
            "\ufeff[a]\r\nenabled=false # x\r\nrollout_percentage = 3\r\n",
        ),
        ("a.enabled = true", "a.enabled = false\na.rollout_percentage = 3\n"),
        ("a={enabled=true}", "a={enabled=false,rollout_percentage = 3}"),
    ],
)
def test_other_ways_to_write_a_flag_are_changed_in_place(text, after, tmp_path):
    path = tmp_path / "features.toml"
    path.write_bytes(text.encode())
    FlagFile(path).roll_out("a", 3)
    assert path.read_bytes().decode() == after


WRONG = [
    ("[a]\nenabled = true\n\n[a]\n", "line 4: '[a]' stands there for the second time"),
    ("[a]\nenabled = true\nenabled = false\n", "line 3: 'enabled = false' stands"),
    ("[a]\nenabled = tru\n", "line 2 is not TOML: 'enabled = tru'"),
    ("a = true", "a: expected a table, [a] and a line enabled = true or false"),
    ("[a]\nenable = true", "a.enable: unknown key (did you mean enabled?)"),
    ("[a]\nenabled = 1", "a: enabled must be true or false, got 1"),
    ("[a]\nrollout_percentage = 101", "whole number from 0 (no model) to 100"),
    ("[a]\nrollout_percentage = -1", "got -1"),
    ("[a]\nrollout_percentage = 2.5", "got 2.5"),
    ("[a]\nrollout_percentage = true", "got True"),
    ('[a]\nallowlist = "m"', 'a list of model ids such as ["a", "b"], got \'m\''),
    ("[a]\nblocklist = [1]", "a: blocklist must be a list"),
    ('[a]\nvalue = ""', "a: value must be a text"),
    ('["A b"]', "'A b': expected a flag's name of small letters"),
    ('[growth]\nvalue = "x"', "growth: value must not be given"),
    ("[grafting_strategies]", "grafting_strategies: value must be given"),
    ('[grafting_strategies]\nvalue = "x"', "must be one of linear, drift_controlled"),
    ("a = " + "[" * 3000, "is nested too deeply"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_file_is_refused_with_what_to_do(text, message, tmp_path):
    path = tmp_path / "features.toml"
    path.write_text(text)
    for act in (FlagFile(path).read, lambda: FlagFile(path).roll_out("growth", 1)):
        with pytest.raises(FlagError) as error:
            act()
        assert message in str(error.value)
        assert str(error.value).startswith(str(path))
    assert path.read_text() == text


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(
        FlagError, match=r"no such file.*copy of configs/features\.toml"
    ):
        FlagFile(tmp_path / "none.toml").read()
    with pytest.raises(FlagError, match="expected a file of flags, and is none"):
        FlagFile(tmp_path).read()
    with pytest.raises(FlagError, match="No such file"):
        FlagFile(tmp_path / "none" / "features.toml").roll_out("growth", 1)
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9")
    with pytest.raises(FlagError, match="is not text in UTF-8"):
        FlagFile(tmp_path / "latin.toml").read()


def test_an_impossible_change_leaves_the_file_alone(file):
    for name, percentage, message in (
        (
            "growht",
            5,
            r"no flag 'growht' \(did you mean growth\?\); it has growth, own",
        ),
        ("growth", 101, "growth: rollout_percentage must be a whole number"),
    ):
        with pytest.raises(FlagError, match=message):
            file.roll_out(name, percentage)
    assert file.path.read_text() == COMMENTED


def test_a_crash_in_the_middle_of_a_change_leaves_the_file_whole(file, monkeypatch):
    def crash(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(FlagError, match="No space left on device"):
        file.roll_out("growth", 10)
    monkeypatch.undo()
    assert file.path.read_text() == COMMENTED
    # What a process that was killed leaves is in nobody's way.
    (file.path.parent / ".features.toml.tmp").write_text("[growth")
    file.roll_out("growth", 10)
    assert [p.name for p in file.path.parent.iterdir()] == ["features.toml"]


def test_links_and_permissions_stay(file):
    link = file.path.parent / "link.toml"
    link.symlink_to(file.path)
    file.path.chmod(0o640)
    FlagFile(link).roll_out("growth", 10)
    assert link.is_symlink()
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o640
    assert file.read()["growth"].rollout_percentage == 10


def test_of_two_writers_neither_loses_a_change(file):
    """Each has a descriptor of its own, so threads wait as processes do."""
    file.path.write_text("[first]\n[second]\n")

    def count(name):
        for percentage in range(1, 21):
            FlagFile(file.path).roll_out(name, percentage)

    with concurrent.futures.ThreadPoolExecutor(2) as writers:
        list(writers.map(count, ["first", "second"]))
    assert file.read() == dict.fromkeys(
        ["first", "second"], Flag(rollout_percentage=20)
    )
