"""Metrics for Prometheus. They have vLLM's names, so that with `metrics_prefix=vllm` its dashboards work."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from specvlm.serve.admission import Admission
from specvlm.serve.generation import Ended, Round
from specvlm.session.session import Session
from specvlm.types import Step

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536)
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts requests, tokens and rounds, and measures latencies.

    Args:
        session: Session whose scheduler and caches are read when metrics are collected.
        admission: Queue whose requests and bytes are read then, too.
        model: Name of the model, used as a label.
        prefix: Prefix of the metrics' names, without the colon.
    """

    def __init__(self, session: Session, admission: Admission, model: str, prefix: str) -> None:
        self.registry = CollectorRegistry()
        self._prefix, self._model = f"{prefix}:", model
        ProcessCollector(registry=self.registry)
        self.registry.register(_Engine(session, admission, self._prefix, model))
        self._drafts = self._counter("spec_decode_num_drafts", "Rounds with guesses")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Guesses checked")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Guesses accepted")
        self._positions = self._counter("spec_decode_num_accepted_tokens_per_pos", "Accepted, by depth", "position")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self._generated = self._counter("generation_tokens", "Tokens of answers")
        self._success = self._counter("request_success", "Answers that ended", "finished_reason")
        self._answered = self._counter("http_requests", "Answers over HTTP, by status", "status")
        self._cancelled = self._counter("requests_cancelled", "Requests whose client disconnected")
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token", LONG)
        self._between = self._histogram("inter_token_latency_seconds", "Time of a round divided by its tokens", SHORT)
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the last token", LONG)
        self._queued = self._histogram("request_queue_time_seconds", "From arrival until it started, reading included", LONG)
        self._lengths = self._histogram("request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self._answers = self._histogram("request_generation_tokens", "Tokens of an answer", TOKENS)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def answered(self, status: int) -> None:
        """Count an HTTP response."""
        self._answered.labels(self._model, str(status)).inc()

    def cancelled(self) -> None:
        """Count a request whose client disconnected."""
        self._cancelled.labels(self._model).inc()

    def started(self, arrival: float, prompt: int) -> None:
        """Count a request that starts.

        Args:
            arrival: When it arrived, by `perf_counter`.
            prompt: Number of tokens of its prompt.
        """
        self._queued.labels(self._model).observe(perf_counter() - arrival)
        self._prompt.labels(self._model).inc(prompt)
        self._lengths.labels(self._model).observe(prompt)

    def round(self, one: Round, before: float | None, arrival: float) -> None:
        """Count a round of an answer.

        Args:
            one: The round.
            before: When the answer's previous round ended, by `perf_counter`; None in the first round.
            arrival: When the request arrived, by `perf_counter`.
        """
        self._generated.labels(self._model).inc(len(one.step.tokens))
        if before is None:
            self._first.labels(self._model).observe(one.at - arrival)
            return
        for _ in one.step.tokens:
            self._between.labels(self._model).observe((one.at - before) / len(one.step.tokens))
        self._speculated(one.step)

    def ended(self, one: Ended, arrival: float) -> None:
        """Count an answer that has ended. arrival: When its request arrived, by `perf_counter`."""
        self._success.labels(self._model, one.result.finish_reason).inc()
        self._answers.labels(self._model).observe(len(one.result.token_ids))
        self._whole.labels(self._model).observe(perf_counter() - arrival)

    def _speculated(self, step: Step) -> None:
        if step.tree is None:
            return
        self._drafts.labels(self._model).inc()
        self._drafted.labels(self._model).inc(step.drafted)
        self._accepted.labels(self._model).inc(step.accepted)
        for depth in range(step.accepted):
            self._positions.labels(self._model, str(depth)).inc()

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(self._prefix + name, what, ["model_name", *labels], registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(self._prefix + name, what, ["model_name"], buckets=buckets, registry=self.registry)


class _Engine:
    """Collector that reads the queue, the scheduler and the caches at each request for metrics."""

    def __init__(self, session: Session, admission: Admission, prefix: str, model: str) -> None:
        self._session, self._admission, self._prefix, self._model = session, admission, prefix, model

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> list[Any]:
        """Current metrics of the queue, the scheduler and the caches."""
        scheduler, admission, caches = self._session.scheduler, self._admission, self._session.caches
        device = self._session.target.device
        every = caches.bytes_on(device)
        leased = every - caches.bytes_on(device, leased=False)
        return [
            self._gauge("num_requests_running", "Requests being read or decoded", admission.running),
            self._gauge("num_requests_waiting", "Requests that wait", admission.waiting),
            self._gauge("body_bytes", "Bytes of request bodies held in memory", admission.held_bytes),
            self._gauge("cache_bytes", "Bytes of KV caches, free ones included", every),
            self._gauge("leased_cache_bytes", "Bytes of KV caches that requests lease", leased),
            self._count("passes_asked", "Passes that requests asked for", scheduler.asked),
            self._count("passes_run", "Engine calls that ran these passes: fewer if calls are shared", scheduler.run),
        ]

    def _gauge(self, name: str, what: str, value: float) -> GaugeMetricFamily:
        found = GaugeMetricFamily(self._prefix + name, what, labels=["model_name"])
        found.add_metric([self._model], value)
        return found

    def _count(self, name: str, what: str, value: float) -> CounterMetricFamily:
        found = CounterMetricFamily(self._prefix + name, what, labels=["model_name"])
        found.add_metric([self._model], value)
        return found
