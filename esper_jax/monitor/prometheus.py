"""The writer for Prometheus: an endpoint that is scraped."""

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from esper_jax.monitor.protocol import Record
from esper_jax.monitor.series import SERIES, Series, Values
from esper_jax.monitor.writers import optional

__all__ = ["DEFAULT_PORT", "Prometheus", "why_not_listen"]

DEFAULT_PORT = 9464


class Prometheus:
    """Serves the last record's values at ``/metrics``. Needs prometheus-client.

    Args:
      port: to listen on; 0 for any that is free. None listens nowhere, for a
        ``registry`` that the program serves itself.
      address: to listen on. Whoever reaches it can read the values; by default that is
        this machine alone.
      registry: a ``prometheus_client.CollectorRegistry`` to add the values to; by
        default one of its own, with nothing else in it.

    Attributes:
      url: where it listens; None if it does not.

    Raises:
      ImportError: without prometheus-client.
      OSError: if the port cannot be listened on.
      ValueError: if the registry holds such names already, or there is neither a port
        nor a registry.
    """

    def __init__(
        self,
        port: int | None = DEFAULT_PORT,
        address: str = "127.0.0.1",
        registry: Any = None,
    ) -> None:
        if port is None and registry is None:
            raise ValueError(
                "port must be a number where no registry is given; got None, so that "
                "nobody could read the values"
            )
        install = "esper-jax[prometheus]"
        client = optional("prometheus_client", "Prometheus", install)
        core = optional("prometheus_client.core", "Prometheus", install)
        self._registry = client.CollectorRegistry() if registry is None else registry
        self._collector = _Collector(core)
        self._registry.register(self._collector)
        self._server: Any = None
        self.url: str | None = None
        if port is not None:
            try:
                self._server, _ = client.start_http_server(
                    port, address, self._registry
                )
            except BaseException:
                self._registry.unregister(self._collector)
                raise
            host = f"[{address}]" if ":" in address else address
            self.url = f"http://{host}:{self._server.server_port}/metrics"

    def write(self, record: Record) -> None:
        """Replaces the values that are served."""
        self._collector.values = record.values

    def close(self) -> None:
        """Stops listening, and takes the values out of the registry."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._registry.unregister(self._collector)


class _Collector:
    """What a registry asks for values. `values` is replaced as a whole."""

    def __init__(self, core: Any) -> None:
        self.values: Values = {}
        self._kinds = {
            "counter": core.CounterMetricFamily,
            "gauge": core.GaugeMetricFamily,
        }

    def describe(self) -> Iterator[Any]:
        """The families without values, by which a registry finds clashes."""
        for series in SERIES:
            labels = [series.label] if series.label else []
            yield self._kinds[series.kind](series.name, _help(series), labels=labels)

    def collect(self) -> Iterator[Any]:
        """The families with the values of the last record."""
        values = self.values
        for family, series in zip(self.describe(), SERIES, strict=True):
            for label, value in values.get(series.name, {}).items():
                family.add_metric([label] if series.label else [], value)
            yield family


def _help(series: Series) -> str:
    return f"{series.meaning[0].upper()}{series.meaning[1:]}."


def why_not_listen(address: str, port: int) -> str | None:
    """Why nobody can listen there now; None if one can."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = found[0]
        with contextlib.closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None
