"""The model calls of the systems that bring no client: one shared HTTP session, the least busy endpoint first."""

from __future__ import annotations

import random
from typing import Any

import aiohttp

from . import stages


class Client:
    """To be made on the event loop that calls it."""

    def __init__(self, urls: list[str]) -> None:
        self._open = dict.fromkeys(urls, 0)
        # No limit and no total timeout: how much is under way is what the systems are compared in.
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )

    async def ask(self, stage: str, page: str) -> tuple[str, str]:
        """The answer, and how the page ends with it (empty: it goes on). Raises `RuntimeError` for a refusal."""
        # Several processes that count for themselves would all prefer the first one at a draw.
        url = min(self._open, key=lambda url: (self._open[url], random.random()))
        self._open[url] += 1
        try:
            async with self._http.post(f"{url}/chat/completions", json=stages.body(stage, page)) as response:
                reply: Any = await response.json()
                if response.status != 200:
                    raise RuntimeError(f"{url} answered {response.status}: {reply}")
        finally:
            self._open[url] -= 1
        answer: str = reply["choices"][0]["message"]["content"]
        return answer, stages.judge(stage, answer)

    async def close(self) -> None:
        await self._http.close()
