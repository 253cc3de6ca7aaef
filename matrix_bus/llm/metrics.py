"""What a model server says of itself: vLLM's metrics, which the others imitate."""

from __future__ import annotations

import asyncio
import re
import time

import aiohttp

_LINE = re.compile(
    r"^(vllm:[a-z0-9_]+|sglang:[a-z0-9_]+|llamacpp:[a-z0-9_]+)(?:\{[^}]*\})?\s+([0-9.eE+-]+)\s*$", re.MULTILINE
)
_RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing")
_WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred")
_TOKENS = ("vllm:generation_tokens_total", "sglang:generation_tokens_total", "llamacpp:tokens_predicted_total")
_LATENCY = ("vllm:e2e_request_latency_seconds", "sglang:e2e_request_latency_seconds")
_TIMEOUT_S = 2.0


def parse(text: str) -> dict[str, float]:
    """Sums over labels of the metrics that are known here, by name."""
    found: dict[str, float] = {}
    for name, value in _LINE.findall(text):
        found[name] = found.get(name, 0.0) + float(value)
    return found


async def sample(url: str, seconds: float) -> str:
    """Load and tokens per second of the server with this base URL, for people; what it does not say is left out."""
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session:
            first, at = await _read(session, url), time.monotonic()
            await asyncio.sleep(seconds)
            second, passed_s = await _read(session, url), time.monotonic() - at
    except (aiohttp.ClientError, TimeoutError, OSError):
        return "does not answer"
    parts = []
    for names, word in ((_RUNNING, "running"), (_WAITING, "waiting")):
        parts += [f"{second[name]:.0f} {word}" for name in names if name in second]
    for name in _LATENCY:
        if (calls := second.get(f"{name}_count", 0.0) - first.get(f"{name}_count", 0.0)) > 0:
            parts.append(f"{(second[f'{name}_sum'] - first.get(f'{name}_sum', 0.0)) / calls:.2f} s a call")
    parts += [f"{(second[n] - first.get(n, 0.0)) / passed_s:.0f} tokens/s" for n in _TOKENS if n in second]
    return ", ".join(parts) or "no metrics"


async def running(url: str) -> float:
    """Calls that the server says it works on or has in line; 0 if it does not say."""
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as session:
            found = await _read(session, url)
    except (aiohttp.ClientError, TimeoutError, OSError):
        return 0.0
    return sum(found.get(name, 0.0) for name in (*_RUNNING, *_WAITING))


async def _read(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    async with session.get(f"{url.removesuffix('/v1')}/metrics") as response:
        return parse(await response.text()) if response.status == 200 else {}
