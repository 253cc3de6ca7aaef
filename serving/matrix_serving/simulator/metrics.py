"""What `/metrics` tells, under the names that vLLM gives to it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from .engine import Engine

_LATENCY_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)


class Histogram:
    """Seconds, counted without a lock: one thread observes, and the same tells."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_LATENCY_S) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(_LATENCY_S, seconds)] += 1
        self._sum += seconds

    def family(self, name: str, help_text: str, model: str) -> Metric:
        """As Prometheus reads it."""
        found = HistogramMetricFamily(name, help_text, labels=["model_name"])
        edges = [*map(str, map(float, _LATENCY_S)), "+Inf"]
        found.add_metric([model], list(zip(edges, accumulate(self._counts), strict=True)), self._sum)
        return found


class Metrics(Collector):
    """The engine's own counters, and what only the server sees."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._model = model
        self.first_token_s = Histogram()
        self.request_s = Histogram()
        self.finished: dict[str, int] = {"stop": 0, "length": 0, "abort": 0}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """All of them, now."""
        engine = self._engine
        gauges = {
            "num_requests_running": ("Sequences in the batch.", len(engine.running)),
            "num_requests_waiting": ("Sequences in line.", len(engine.waiting)),
            "kv_cache_usage_perc": ("KV cache in use, 1 is all of it.", engine.cache_usage),
            "gpu_cache_usage_perc": ("The same under its older name.", engine.cache_usage),
        }
        counters = {
            "prompt_tokens": ("Prompt tokens of sequences that were begun.", engine.prompt_tokens),
            "generation_tokens": ("Tokens generated.", engine.generation_tokens),
            "num_preemptions": ("Sequences that gave their blocks back.", engine.preemptions),
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", engine.prefix_queries),
            "prefix_cache_hits": ("Prompt tokens found there.", engine.prefix_hits),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
        success = CounterMetricFamily(
            "vllm:request_success", "Sequences that ended.", labels=["model_name", "finished_reason"]
        )
        for reason, count in self.finished.items():
            success.add_metric([self._model, reason], count)
        yield success
        yield self.first_token_s.family("vllm:time_to_first_token_seconds", "From arrival.", self._model)
        yield self.request_s.family("vllm:e2e_request_latency_seconds", "From arrival to the last token.", self._model)
