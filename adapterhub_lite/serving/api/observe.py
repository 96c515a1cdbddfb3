"""What the server tells of itself: series for Prometheus, and one line of JSON in the log per request.

Never a prompt, an answer or a key. Labels are bounded: an adapter's is its name and version, whatever weights a client
gives it, and the ones beyond `MOST_LABELS` are "other". One set of series per server, so that several can live in one
process; with keys one more per key, which is all that key may see.
"""

import json
import logging
import re
import time
import traceback
import uuid
from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub_lite.serving.api.errors import error_body, error_response
from adapterhub_lite.serving.engine.request import EngineStatus, GenerationResult

logger = logging.getLogger("adapterhub.access")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
FINE_SECONDS = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
BASE, BLEND, NONE, OTHER = "base", "blend", "none", "other"
MOST_LABELS = 500
REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}")


class BoundedLabels:
    """Hands a label's values through until there are too many different ones; those after it are "other"."""

    def __init__(self, most: int = MOST_LABELS) -> None:
        self._most, self._seen = most, {NONE, BASE, BLEND}

    def __call__(self, value: str) -> str:
        """The value, or "other"."""
        if value not in self._seen:
            if len(self._seen) >= self._most:
                return OTHER
            self._seen.add(value)
        return value


def adapter_label(adapter: str | None) -> str:
    """The label of what answered: `name:version`, "blend" for several of them, or "base"."""
    if adapter is None:
        return BASE
    return BLEND if "+" in adapter else adapter.partition("*")[0]


class Series:
    """The series over answers, of everybody or of one key. `adapter` is what answered, never what was typed."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._adapter = BoundedLabels()
        self._requests = Counter(
            "adapterhub_requests", "Requests answered", ["route", "status", "adapter"], registry=registry
        )
        self._tokens = Counter("adapterhub_tokens", "Tokens read and written", ["kind", "adapter"], registry=registry)
        self._first_token = Histogram(
            "adapterhub_time_to_first_token_seconds", "From arrival", ["adapter"], buckets=SECONDS, registry=registry
        )
        self._inter_token = Histogram(
            "adapterhub_inter_token_seconds", "Mean gap", ["adapter"], buckets=FINE_SECONDS, registry=registry
        )
        self._queue = Histogram("adapterhub_queue_seconds", "Wait for a row", buckets=SECONDS, registry=registry)
        self._switch = Histogram(
            "adapterhub_switch_seconds", "From reference to routed row", ["adapter"], buckets=FINE_SECONDS,
            registry=registry,
        )  # fmt: skip

    def finished(self, route: str, status: int, adapter: str) -> None:
        """Count one request; `adapter` is a label."""
        self._requests.labels(route, str(status), self._adapter(adapter)).inc()

    def answered(self, result: GenerationResult) -> None:
        """Count one finished answer."""
        adapter, usage, timings = self._adapter(adapter_label(result.adapter)), result.usage, result.timings
        self._tokens.labels("prompt", adapter).inc(usage.prompt_tokens)
        self._tokens.labels("completion", adapter).inc(usage.completion_tokens)
        self._first_token.labels(adapter).observe(timings.first_token_seconds)
        self._queue.observe(timings.queue_seconds)
        if result.adapter:
            self._switch.labels(adapter).observe(timings.switch_seconds)
        if usage.completion_tokens > 1:
            gap = (timings.total_seconds - timings.first_token_seconds) / (usage.completion_tokens - 1)
            self._inter_token.labels(adapter).observe(gap)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class Metrics(Series):
    """The series of everybody, those of the engine and the queue, and per tenant (a key, without keys an address)."""

    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        self.load = Histogram(
            "adapterhub_adapter_load_seconds", "Loads asked for by an admin or the start", ["adapter"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.refused = Counter(
            "adapterhub_requests_refused", "Requests told to come back later", ["tenant"], registry=registry
        )
        self._tenant = BoundedLabels()
        self._tenant_tokens = Counter(
            "adapterhub_tenant_tokens", "Tokens read and written", ["kind", "tenant"], registry=registry
        )
        self._tenant_in_work = Gauge(
            "adapterhub_tenant_prompts_in_work", "Prompts in work now", ["tenant"], registry=registry
        )
        self._tenant_waiting = Gauge(
            "adapterhub_tenant_requests_waiting", "Requests that wait for a row now", ["tenant"], registry=registry
        )
        self.in_work = Gauge("adapterhub_prompts_in_work", "Prompts in work now", registry=registry)
        self.draining = Gauge("adapterhub_draining", "1 while the server drains", registry=registry)
        self._engine = {
            name: Gauge(f"adapterhub_{name}", text, registry=registry)
            for name, text in (
                ("adapters_resident", "Adapters in memory now"),
                ("requests_in_rows", "Requests that are computed now"),
                ("requests_waiting", "Requests that wait for a row now"),
                ("adapter_loads", "Loads since the engine's start"),
                ("adapter_evictions", "Evictions since the engine's start"),
                ("damaged_loads", "Loads refused because the bytes were not the recorded ones"),
                ("engine_restarts", "How often the engine began anew after a failure of its own"),
                ("cache_bytes", "Bytes allocated for keys and values now"),
                ("cache_budget_bytes", "Bytes that keys and values may take; 0 without a limit"),
                ("engine_serving", "1 while the engine computes"),
            )
        }
        self._own: defaultdict[str, Series] = defaultdict(Series)

    def update(self, status: EngineStatus, in_work: dict[str, int]) -> None:
        """Take over the engine's own counts, and the prompts in work per tenant."""
        for name, value in (
            ("adapters_resident", status.resident),
            ("requests_in_rows", status.running),
            ("requests_waiting", status.waiting),
            ("adapter_loads", status.loads),
            ("adapter_evictions", status.evictions),
            ("damaged_loads", status.damaged),
            ("engine_restarts", status.restarts),
            ("cache_bytes", status.cache_bytes),
            ("cache_budget_bytes", status.cache_budget or 0),
            ("engine_serving", int(status.can_serve)),
        ):
            self._engine[name].set(value)
        self._tenant_in_work.clear()
        for tenant, prompts in in_work.items():
            self._tenant_in_work.labels(self._tenant(tenant)).inc(prompts)
        self._tenant_waiting.clear()
        for tenant, waiting in status.waiting_by_tenant.items():
            self._tenant_waiting.labels(self._tenant(tenant or NONE)).inc(waiting)
        self.in_work.set(sum(in_work.values()))

    def own(self, key: str) -> Series:
        """The series of one key, by its label; there are as many as the file of keys has keys."""
        return self._own[key]

    def turned_away(self, tenant: str) -> None:
        """Count a request that was told to come back later."""
        self.refused.labels(self._tenant(tenant)).inc()

    def spent(self, tenant: str, result: GenerationResult) -> None:
        """Count the tokens of an answer for its tenant."""
        name = self._tenant(tenant)
        self._tenant_tokens.labels("prompt", name).inc(result.usage.prompt_tokens)
        self._tenant_tokens.labels("completion", name).inc(result.usage.completion_tokens)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message; the access log's lines are such objects already."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        if record.name == logger.name:
            return record.getMessage()
        line = {"time": _now(record.created), "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.getMessage()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr() -> None:
    """Write the log of the server and of uvicorn to standard error, unless the process has set them up otherwise."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in (("adapterhub", logging.INFO), ("uvicorn.error", logging.WARNING)):
        target = logging.getLogger(name)
        if not target.handlers:
            target.addHandler(handler)
            target.setLevel(level)
            target.propagate = False


class AccessLog:
    """Gives each request an id, logs and counts it when it has ended, and answers what no handler caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, then log and count it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # Anything in `state` is set by the layers below.
        state: dict[str, Any] = scope.setdefault("state", {})
        started, status = time.perf_counter(), 0
        given = Headers(scope=scope).get("x-request-id", "")
        state["id"] = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = state["id"]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            state["failure"] = error
            if not status:
                await error_response(error)(scope, receive, send_with_id)
        finally:
            self._record(scope, status or 499, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        route = getattr(scope.get("route"), "path", "none")
        adapter = adapter_label(state["adapter"]) if "adapter" in state else NONE
        caller, failure = state.get("caller"), state.get("failure")
        self.metrics.finished(route, status, adapter)
        if caller is not None and caller.label.startswith("key-"):
            self.metrics.own(caller.label).finished(route, status, adapter)
        # A stream that failed in the middle had status 200 already.
        failed = failure is not None and error_body(failure)[0] >= 500
        line = {
            "time": _now(time.time()), "level": "error" if failed else "info", "request_id": state["id"],
            "method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 6),
            "caller": caller.label if caller else None, "adapter": state.get("adapter") or adapter,
            "usage": state.get("usage"), "error": type(failure).__name__ if failure else None,
        }  # fmt: skip
        if failed:
            line["traceback"] = "".join(traceback.format_exception(failure))
        logger.log(logging.ERROR if failed else logging.INFO, json.dumps(line))


def _now(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
