"""Flags: what a file says of a model, how it is changed, what OpenFeature is told."""

import ast
import concurrent.futures
import dataclasses
import json
import os
import queue
import re
import stat
import sys
from pathlib import Path

import pytest
from openfeature import api
from openfeature.evaluation_context import EvaluationContext
from openfeature.event import ProviderEvent
from openfeature.exception import GeneralError
from openfeature.provider import ProviderStatus
from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider

import esper_jax
from esper_jax.rollout import (
    FEATURES,
    Features,
    Flag,
    FlagError,
    FlagFile,
    HybridLayer,
    bucket,
    decide,
)
from esper_jax.rollout.provider import (
    DOMAIN,
    FlagFileProvider,
    features_for,
    flag_for,
)

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
    file.change("own_thing", value="some")
    file.change("own_thing", value=None)
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
    with pytest.raises(FlagError, match=r"no such file.*a line \[NAME\] and a line"):
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


FLAGS = """\
[on]
enabled = true
[part]
rollout_percentage = 50
allowlist = ["vip"]
blocklist = ["bad"]
[none]
[grafting_strategies]
rollout_percentage = 50
value = "momentum"
"""


@pytest.fixture
def client(file):
    """A client of a provider of `FLAGS`. ``m66`` is number 21 and ``m91`` 79."""
    file.path.write_text(FLAGS)
    api.set_provider_and_wait(FlagFileProvider(file.path), DOMAIN)
    yield api.get_client(DOMAIN)
    api.clear_providers()


def asked(client, name, model_id=None, default=False):
    context = EvaluationContext(targeting_key=model_id)
    ask = client.get_string_details
    if not isinstance(default, str):
        ask = client.get_boolean_details
    found = ask(name, default, context)
    return found.value, found.reason, found.error_code


def test_openfeature_is_told_value_and_reason(client):
    assert asked(client, "on") == (True, "STATIC", None)
    assert asked(client, "none", "m66") == (False, "DISABLED", None)
    assert asked(client, "part", "bad", True) == (False, "TARGETING_MATCH", None)
    assert asked(client, "part", "vip") == (True, "TARGETING_MATCH", None)
    assert asked(client, "part", "m66") == (True, "SPLIT", None)
    assert asked(client, "part", "m91", True) == (False, "SPLIT", None)
    assert asked(client, "part", None, True) == (False, "DEFAULT", None)
    # A flag with a value answers with it, or with the caller's default.
    name = "grafting_strategies"
    assert asked(client, name, "m66", "linear") == ("momentum", "SPLIT", None)
    assert asked(client, name, "m91", "linear") == ("linear", "SPLIT", None)
    # One of ours that the file leaves out has the default without a word.
    assert asked(client, "growth", "m66", True) == (True, "DEFAULT", None)


def test_what_cannot_be_answered_is_an_error_and_the_default(client, caplog):
    for _ in range(3):
        assert asked(client, "prat", "m66", True) == (True, "ERROR", "FLAG_NOT_FOUND")
        assert client.get_integer_details("qart", 3).error_code == "FLAG_NOT_FOUND"
    [first, second] = caplog.messages  # each once
    assert "has no flag 'prat': the default holds. Write [prat] into the" in first
    assert "'qart'" in second
    wrong = (True, "ERROR", "TYPE_MISMATCH")
    assert asked(client, "grafting_strategies", "m66", True) == wrong
    assert asked(client, "on", "m66", "x") == ("x", "ERROR", "TYPE_MISMATCH")
    for ask, default in (
        (client.get_integer_details, 3),
        (client.get_float_details, 0.5),
        (client.get_object_details, {"a": 1}),
    ):
        found = ask("on", default)
        assert (found.value, found.error_code) == (default, "TYPE_MISMATCH")


def test_arguments_of_a_wrong_type_are_refused(client):
    """With a number as its id, a model would miss each list and have the default."""
    with pytest.raises(FlagError, match=r"model_id: expected text or None, got 7; pa"):
        features_for(7)
    with pytest.raises(FlagError, match="default of on: expected True, False or text"):
        flag_for("on", "m66", 1)


def test_the_environment_overrides_the_file(client, monkeypatch):
    for word, value in (("1", True), ("OFF", False), ("yes", True), ("false", False)):
        monkeypatch.setenv("ESPER_FEATURE_PART", word)
        assert asked(client, "part", "bad") == (value, "STATIC", None)
        assert flag_for("part", "bad", True) is value
    monkeypatch.setenv("ESPER_FEATURE_PART", "perhaps")
    assert asked(client, "part", "vip") == (False, "ERROR", "PARSE_ERROR")
    with pytest.raises(FlagError, match=r"1 or 0, true or false.*got 'perhaps'. Corr"):
        flag_for("part", "vip", False)
    monkeypatch.setenv("ESPER_FEATURE_PART", "")  # as good as unset
    assert asked(client, "part", "vip") == (True, "TARGETING_MATCH", None)
    monkeypatch.setenv("ESPER_FEATURE_GRAFTING_STRATEGIES", "linear")
    assert features_for("m66").grafting_strategies == "linear"
    monkeypatch.setenv("ESPER_FEATURE_GRAFTING_STRATEGIES", "steep")
    with pytest.raises(FlagError, match=r"must be one of linear.*got 'steep'. Corr"):
        features_for("m66")


def test_a_changed_file_is_read_again_and_a_broken_one_is_not(client, file, caplog):
    events = queue.Queue()
    for event in (
        ProviderEvent.PROVIDER_STALE,
        ProviderEvent.PROVIDER_CONFIGURATION_CHANGED,
    ):
        client.add_handler(event, events.put)
    file.roll_out("part", 10)
    assert asked(client, "part", "m66") == (False, "SPLIT", None)
    assert events.get(timeout=10).flags_changed == ["part"]
    sound = file.path.read_text()
    for broken in (sound + "[part]", "# written anew", None):
        if broken is None:
            file.path.unlink()
        else:
            file.path.write_text(broken)
        for _ in range(3):
            assert asked(client, "on") == (True, "STALE", None)
            assert asked(client, "part", "m66") == (False, "STALE", None)
        [said] = caplog.messages  # once
        caplog.clear()
        assert "The flags from before hold until that is mended" in said
        assert events.get(timeout=10).message in said
        assert client.get_provider_status() is ProviderStatus.STALE
    file.path.write_text(sound.replace("= 10", "= 30"))
    assert asked(client, "part", "m66") == (True, "SPLIT", None)
    assert client.get_provider_status() is ProviderStatus.READY
    assert events.get(timeout=10).flags_changed == ["part"]
    assert not caplog.messages


def test_a_relative_path_outlives_a_change_of_the_folder(file, monkeypatch, caplog):
    monkeypatch.chdir(file.path.parent)
    provider = FlagFileProvider(file.path.name)
    monkeypatch.chdir("/")
    assert provider.flags() == file.read()
    assert not caplog.messages


def test_a_broken_file_is_no_beginning(tmp_path):
    (tmp_path / "features.toml").write_text("growth = true")
    with pytest.raises(FlagError, match="growth: expected a table"):
        FlagFileProvider(tmp_path / "features.toml")


@pytest.fixture
def foreign():
    """Sets the user's own provider, with given flags, as OpenFeature's default."""

    def set_flags(**values):
        flags = {name: InMemoryFlag("it", {"it": v}) for name, v in values.items()}
        provider = InMemoryProvider(flags)
        api.set_provider_and_wait(provider)
        return provider

    yield set_flags
    api.clear_providers()


def test_another_provider_is_used_as_it_is(foreign, monkeypatch, caplog):
    foreign(growth=False, grafting_strategies="momentum")
    expected = Features(growth=False, grafting_strategies="momentum")
    assert features_for("m66") == expected
    base = Features(incubation=False)
    assert features_for("m66", defaults=base) == dataclasses.replace(
        expected, incubation=False
    )
    monkeypatch.setenv("ESPER_FEATURE_GROWTH", "on")
    assert features_for("m66") == dataclasses.replace(expected, growth=True)
    assert not caplog.messages


def test_what_another_provider_has_wrong_is_told(foreign, monkeypatch, caplog):
    foreign(grafting_strategies="steep")
    with pytest.raises(FlagError, match=r"grafting_strategies must be one of linear"):
        features_for("m66")
    foreign(growth="yes")
    with pytest.raises(FlagError, match="growth: Expected type <class 'bool'>"):
        features_for("m66")
    provider = foreign()

    def fails(*_, **__):
        raise GeneralError("nobody answers")

    monkeypatch.setattr(provider, "resolve_boolean_details", fails)
    assert features_for("m66") == Features()
    assert "growth: the default True holds, since the provider of the flags failed" in (
        caplog.text
    )


def test_the_shipped_file_and_the_docs_have_every_flag_and_change_nothing():
    root = Path(esper_jax.__file__).parents[1]
    provider = FlagFileProvider(root / "configs" / "features.toml")
    assert list(provider.flags()) == list(FEATURES)
    api.set_provider_and_wait(provider, DOMAIN)
    assert features_for("m66") == Features()
    api.clear_providers()
    rows = re.findall(r"^\| `(\w+)` \|", (root / "docs/flags.md").read_text(), re.M)
    assert rows == list(FEATURES)


def test_without_a_provider_the_defaults_hold():
    assert features_for("m66") == Features()
    assert dataclasses.asdict(Features()) == FEATURES


def test_the_provider_alone_imports_what_the_extra_installs():
    package = Path(esper_jax.__file__).parent
    needing = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        for inner in ast.walk(node)
        if _root(inner) in ("openfeature", "tomlkit")
    }
    assert needing == {"rollout/provider.py"}


def _root(node):
    """The package that a statement imports from, if it is an import."""
    if isinstance(node, ast.Import):
        return node.names[0].name.split(".")[0]
    return (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else ""


def test_a_missing_extra_is_an_error_in_words(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomlkit", None)
    with pytest.raises(FlagError, match=r"needs tomlkit: pip install 'esper-jax\[rol"):
        file.roll_out("growth", 10)
    assert file.path.read_text() == COMMENTED
    monkeypatch.delitem(sys.modules, "esper_jax.rollout.provider")
    monkeypatch.setitem(sys.modules, "openfeature", None)
    with pytest.raises(ImportError, match=r"pip install 'esper-jax\[rollout\]'"):
        HybridLayer(None, 4, model_id="m66", rngs=None)
