"""What the server tells of itself: series for Prometheus, and one line of JSON in the log per request.

Never a prompt, an answer or a key. One registry of series per server, so that several can live in one process.
"""

import json
import logging
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub_lite.serving.engine.request import EngineStatus, GenerationResult

logger = logging.getLogger("adapterhub.access")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
FINE_SECONDS = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
BASE = "base"


class Metrics:
    """The series. The label `adapter` is what answered (`name:version`, a blend, or "base"), never what was typed."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "adapterhub_requests", "Requests answered", ["route", "status", "adapter"], registry=registry
        )
        self.tokens = Counter("adapterhub_tokens", "Tokens read and written", ["kind", "adapter"], registry=registry)
        self.first_token = Histogram(
            "adapterhub_time_to_first_token_seconds", "From arrival", ["adapter"], buckets=SECONDS, registry=registry
        )
        self.inter_token = Histogram(
            "adapterhub_inter_token_seconds", "Mean gap", ["adapter"], buckets=FINE_SECONDS, registry=registry
        )
        self.queue = Histogram("adapterhub_queue_seconds", "Wait for a row", buckets=SECONDS, registry=registry)
        self.switch = Histogram(
            "adapterhub_switch_seconds",
            "From reference to routed row",
            ["adapter"],
            buckets=FINE_SECONDS,
            registry=registry,
        )
        self.load = Histogram(
            "adapterhub_adapter_load_seconds", "Loads asked for by an admin or the start", ["adapter"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.in_work = Gauge("adapterhub_requests_in_work", "Requests in work now", registry=registry)
        self.slots = Gauge("adapterhub_adapters_resident", "Adapters in memory now", registry=registry)
        self.running = Gauge("adapterhub_requests_in_rows", "Requests that are computed now", registry=registry)
        self.waiting = Gauge("adapterhub_requests_waiting", "Requests that wait for a row now", registry=registry)
        self.loads = Gauge("adapterhub_adapter_loads", "Loads since the engine's start", registry=registry)
        self.evictions = Gauge("adapterhub_adapter_evictions", "Evictions since the engine's start", registry=registry)

    def update(self, status: EngineStatus) -> None:
        """Take over the engine's own counts."""
        self.slots.set(status.resident)
        self.running.set(status.running)
        self.waiting.set(status.waiting)
        self.loads.set(status.loads)
        self.evictions.set(status.evictions)

    def answered(self, result: GenerationResult) -> None:
        """Count one finished answer."""
        adapter, usage, timings = result.adapter or BASE, result.usage, result.timings
        self.tokens.labels("prompt", adapter).inc(usage.prompt_tokens)
        self.tokens.labels("completion", adapter).inc(usage.completion_tokens)
        self.first_token.labels(adapter).observe(timings.first_token_seconds)
        self.queue.observe(timings.queue_seconds)
        if result.adapter:
            self.switch.labels(adapter).observe(timings.switch_seconds)
        if usage.completion_tokens > 1:
            gap = (timings.total_seconds - timings.first_token_seconds) / (usage.completion_tokens - 1)
            self.inter_token.labels(adapter).observe(gap)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


def log_to_stderr() -> None:
    """Write the access log to standard error, unless the process has set it up otherwise."""
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


class AccessLog:
    """Gives each request an id, logs and counts it when it has ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics, new_id: Callable[[], str]) -> None:
        self.app, self.metrics, self.new_id = app, metrics, new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, then log and count it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        state, started, status = scope.setdefault("state", {}), time.perf_counter(), 499
        state["id"] = self.new_id()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = state["id"]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        route = getattr(scope.get("route"), "path", "none")
        adapter = state.get("adapter") or BASE
        self.metrics.requests.labels(route, str(status), adapter).inc()
        failure = state.get("failure")
        line = {"request_id": state["id"], "method": scope["method"], "route": route, "status": status,
                "seconds": round(seconds, 6), "caller": state.get("caller"), "adapter": adapter,
                "usage": state.get("usage"), "error": type(failure).__name__ if failure else None}  # fmt: skip
        logger.info(json.dumps(line))
