"""A monitor's figures for Prometheus: text of its exposition format, or an endpoint that serves it.

Needs the package `prometheus-client`; each monitor has a registry of its own, so nothing is registered globally.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from ..errors import CtxoptError
from .monitor import Monitor


class _Collector:
    """Reads the monitor whenever somebody asks."""

    def __init__(self, monitor: Monitor, core: Any) -> None:
        self._monitor, self._core = monitor, core

    def collect(self) -> Iterator[Any]:
        """The metric families."""
        stats = self._monitor.stats()
        gauge, counter = self._core.GaugeMetricFamily, self._core.CounterMetricFamily
        yield gauge("ctxopt_memory_use", "Share of the memory in use at the last poll.", value=stats["use"])
        yield gauge("ctxopt_accepting", "Whether new work is accepted.", value=int(stats["accepting"]))
        yield counter("ctxopt_crossings", "Times that use crossed the high mark.", value=stats["crossings"])
        actions = counter("ctxopt_actions", "Actions taken and undone.", labels=["kind", "action"])
        for name, count in stats["counts"].items():
            actions.add_metric(name.split(" ", 1), count)
        yield actions


def registry(monitor: Monitor) -> Any:
    """A `CollectorRegistry` with the monitor's figures.

    Raises:
        CtxoptError: prometheus-client is not installed.
    """
    client, core = _client(), import_module("prometheus_client.core")
    found = client.CollectorRegistry()
    found.register(_Collector(monitor, core))
    return found


def text(monitor: Monitor) -> str:
    """The figures as Prometheus reads them. Raises `CtxoptError` as `registry` does."""
    page: bytes = _client().generate_latest(registry(monitor))
    return page.decode()


def serve(monitor: Monitor, port: int = 9400, host: str = "127.0.0.1") -> Any:
    """Serve the figures over HTTP from a thread of their own.

    Returns:
        The server and its thread; `server.shutdown()` ends it.

    Raises:
        CtxoptError: prometheus-client is not installed.
    """
    return _client().start_http_server(port, addr=host, registry=registry(monitor))


def _client() -> Any:
    try:
        return import_module("prometheus_client")
    except ImportError as error:
        raise CtxoptError("metrics need prometheus-client: pip install prometheus-client") from error
