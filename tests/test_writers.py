"""What each writer writes, as those read it that it is written for."""

import socket
import sys
import types
import urllib.error
import urllib.request

import numpy as np
import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families
from reports import report, rollback, seeds, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Outcome, Stage
from esper_jax.monitor import (
    SERIES,
    Monitor,
    Prometheus,
    TensorBoard,
    WeightsAndBiases,
)
from esper_jax.monitor.prometheus import why_not_listen


def grafted(tick, loss=1.5):
    """A tick after which one of two seeds counts for a quarter."""
    layer = seeds(
        [Stage.GRAFTING, Stage.DORMANT],
        alpha=[0.25, 0.0],
        source=[Stage.TRAINING, Stage.DORMANT],
        target=[Stage.GRAFTING, -1],
        outcome=[Outcome.OK, Outcome.NONE],
        signals=Signals.unmeasured(worth=np.float32([0.5, np.nan])),
    )
    return report(tick, {"layers/0": layer}, loss=loss)


def written(*writers, after=None):
    """Two ticks and a rollback by these writers."""
    with Monitor(writers) as monitor:
        for tick, loss in ((1, 1.5), (2, np.nan)):
            monitor.write(grafted(tick, loss))
        monitor.write_rollback(rollback(1))
    assert not monitor.lost
    return monitor


def read(folder):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def scalars(events, tag):
    """Steps and values of a tag."""
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_reads_it(tmp_path):
    folder = tmp_path / "a" / "b"
    written(TensorBoard(folder))
    events = read(folder)
    tags = events.Tags()
    assert {tag.split("/")[0] for tag in tags["scalars"]} == {s.name for s in SERIES}
    assert tags["tensors"] == ["esper_events/text_summary"]
    assert scalars(events, "esper_held_out_loss")[0] == (8, 1.5)
    assert np.isnan(scalars(events, "esper_held_out_loss")[1][1])
    assert scalars(events, "esper_seeds/GRAFTING") == [(8, 1), (16, 1), (16, 1)]
    assert scalars(events, "esper_layer_blended_seeds/layers/0")[0] == (8, 0.25)
    assert scalars(events, "esper_rollbacks_total/TRAIN_LOSS")[-1] == (16, 1)
    [first, *_, last] = events.Tensors("esper_events/text_summary")
    assert first.tensor_proto.string_val[0].startswith(b"seed 0: TRAINING -> GRAFTING")
    assert b"rollback 1, from tick 3 to 2" in last.tensor_proto.string_val[0]


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path):
    with Monitor([TensorBoard(tmp_path)]) as monitor:
        for tick in (1, 2, 3):
            monitor.write(grafted(tick, loss=1.0))
    with Monitor([TensorBoard(tmp_path, after=8)]) as monitor:
        monitor.write(grafted(2, loss=2.0))
    assert scalars(read(tmp_path), "esper_held_out_loss") == [(8, 1.0), (16, 2.0)]
    assert len(list(tmp_path.iterdir())) == 2


def scrape(url):
    """What an endpoint serves: by name, the kind, the help and samples by label."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        by_label = {tuple(s.labels.items()): s.value for s in family.samples}
        # The parser cuts _total off the families of counters, as OpenMetrics does.
        name = family.name + ("_total" if family.type == "counter" else "")
        found[name] = family.type, family.documentation, by_label
    return found


def test_prometheus_scrapes_it():
    writer = Prometheus(port=0)
    assert writer.url.startswith("http://127.0.0.1:")
    assert all(not samples for _, _, samples in scrape(writer.url).values())
    monitor = Monitor([writer])
    monitor.write(grafted(1))
    monitor.write(grafted(2, loss=np.nan))
    wait_for(lambda: scrape(writer.url)["esper_ticks_total"][2] == {(): 2})
    found = scrape(writer.url)
    assert set(found) == {s.name for s in SERIES}
    for series in SERIES:
        kind, words, samples = found[series.name]
        assert kind == series.kind
        assert words.rstrip(".").lower() == series.meaning.lower()
        labels = {label for pairs in samples for label, _ in pairs}
        assert labels == ({series.label} if series.label else set())
    assert np.isnan(found["esper_held_out_loss"][2][()])
    assert found["esper_seeds"][2][(("stage", "GRAFTING"),)] == 1
    assert found["esper_layer_blended_seeds"][2] == {(("layer", "layers/0"),): 0.25}
    assert found["esper_signal_mean"][2] == {(("signal", "worth"),): 0.5}
    assert found["esper_monitor_lost_total"][2] == {(("writer", "Prometheus"),): 0}
    monitor.close()
    with pytest.raises(urllib.error.URLError):
        scrape(writer.url)


def test_prometheus_listens_on_this_machine_alone_unless_told():
    here = Prometheus(port=0)
    port = int(here.url.split(":")[2].split("/")[0])
    # Another address of the same machine: free, so nobody listens on all of them.
    assert why_not_listen("127.0.0.1", port) == "Address already in use"
    assert why_not_listen("127.0.0.2", port) is None
    with pytest.raises(OSError, match="in use"):
        Prometheus(port)
    here.close()
    everywhere = Prometheus(port=0, address="0.0.0.0")
    port = int(everywhere.url.split(":")[2].split("/")[0])
    assert "esper_seeds" in scrape(f"http://127.0.0.2:{port}/metrics")
    everywhere.close()


def test_prometheus_takes_a_registry_of_ones_own():
    registry = prometheus_client.CollectorRegistry()
    own = prometheus_client.Gauge("mine", "of the program", registry=registry)
    own.set(3)
    with Monitor([Prometheus(port=None, registry=registry)]) as monitor:
        monitor.write(grafted(1))
        wait_for(lambda: registry.get_sample_value("esper_ticks_total") == 1)
        assert registry.get_sample_value("mine") == 3
        with pytest.raises(ValueError, match="Duplicated timeseries"):
            Prometheus(port=None, registry=registry)
        taken = socket.socket()
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        other = prometheus_client.CollectorRegistry()
        with pytest.raises(OSError, match="in use"):
            Prometheus(taken.getsockname()[1], registry=other)
        taken.close()
        Prometheus(port=None, registry=other)  # nothing was left in it
    assert registry.get_sample_value("esper_ticks_total") is None  # it is over
    assert registry.get_sample_value("mine") == 3


def test_weights_and_biases_is_given_it(monkeypatch):
    """By a stand-in for the package, which needs an account or a server."""
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    def init(**given):
        calls.append(given)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    writer = WeightsAndBiases(project="p", mode="offline")
    assert not calls  # the network is not waited for
    written(writer)
    assert calls[0] == {"project": "p", "mode": "offline"}
    assert [call[0] for call in calls[1:-1]] == [8, 16, 16]
    assert calls[-1] == "finish"
    names = {name.split("/")[0] for name in calls[2][1]}
    assert names == {s.name for s in SERIES}
    assert calls[1][1]["esper_seeds/GRAFTING"] == 1


@pytest.mark.parametrize(
    ("make", "module", "install"),
    [
        (TensorBoard, "tensorboardX", r"esper-jax\[tensorboard\]"),
        (Prometheus, "prometheus_client", r"esper-jax\[prometheus\]"),
        (WeightsAndBiases, "wandb", "wandb"),
    ],
)
def test_what_is_not_installed_is_named(make, module, install, monkeypatch, tmp_path):
    for name in [n for n in sys.modules if n.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    given = (tmp_path / "new",) if make is TensorBoard else ()
    with pytest.raises(ImportError, match=f"needs {module}: pip install '{install}'"):
        make(*given)
    assert not list(tmp_path.iterdir())
