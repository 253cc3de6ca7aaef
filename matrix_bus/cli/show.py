"""What a person sees of a run: a progress line while it goes, a summary when it is done."""

from __future__ import annotations

import shutil
import sys
import time

from ..orchestrator import Usage
from ..registry import Progress
from ..run import EndpointTally, Tally


class ProgressLine:
    """One line that is rewritten on a terminal, and written anew every few seconds into a file."""

    _EVERY_S = 10.0

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown_at = 0.0
        self._last = ""
        self._started = time.monotonic()

    def show(self, text: str, *, force: bool = False) -> None:
        now = time.monotonic()
        text = f"[{_clock(now - self._started)}] {text}"
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]:<{width}}", end="", file=sys.stderr, flush=True)
        elif (force or now - self._shown_at >= self._EVERY_S) and text != self._last:
            self._shown_at = now
            print(text, file=sys.stderr, flush=True)
        self._last = text

    def clear(self) -> None:
        if self._live:
            print(
                "\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r",
                end="",
                file=sys.stderr,
                flush=True,
            )


def progress_text(now: Progress, tally: Tally, read: int | None = None) -> str:
    """`12/24 rows done · 4 in flight · 16 admitted · 9 agreement, 3 no_agreement · 85 tokens/s`

    `read` is how many rows were read so far, while there are more.
    """
    of = now.total if now.total is not None else "?"
    parts = [f"{tally.rows}/{of} rows done", f"{now.in_flight} in flight"]
    if read is not None or now.waiting:
        parts.append(f"{max(tally.rows, now.outcomes - now.retried) + now.in_flight} admitted")
    if read is not None:
        parts.append(f"{read} read")
    if tally.reasons:
        parts.append(", ".join(f"{n} {reason or kind}" for (kind, reason), n in tally.reasons.most_common(4)))
    if tally.seconds > 0 and tally.usage.calls:
        parts.append(f"{tally.usage.completion_tokens / tally.seconds:.0f} tokens/s")
    return " · ".join(parts)


def summary(tally: Tally) -> str:
    """The numbers of a finished run, as a small table."""
    seconds = tally.seconds
    rows = [("rows", f"{tally.rows} in {seconds:.1f} s ({_rate(tally.rows, seconds)} rows/s)")]
    rows += [
        (kind if not reason else f"{kind}: {reason}", f"{n} ({n / tally.rows:.0%})")
        for (kind, reason), n in tally.reasons.most_common()
    ]
    rows += [(name.replace("_", " "), f"{value:.3g}") for name, value in tally.metrics.items()]
    rows.append(("hops", f"{tally.hops} ({_rate(tally.hops, seconds)}/s)"))
    rows.append(("model calls", f"{tally.usage.calls}"))
    if tally.usage.calls:
        rows.append(("tokens", _tokens(tally.usage)))
        rows += [(f"  {role}", _tokens(usage)) for role, usage in tally.usage_by_role.items() if usage.calls]
        rows += [(f"  {url}", _endpoint(of)) for url, of in tally.endpoints.items() if len(tally.endpoints) > 1]
        if tally.usage.cost:
            rows.append(("cost", f"{tally.usage.cost:.4g}"))
        rows.append(("tokens/s", f"{_rate(tally.usage.completion_tokens, seconds)} completion"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _tokens(usage: Usage) -> str:
    return f"{usage.prompt_tokens} prompt + {usage.completion_tokens} completion in {usage.calls} calls"


def _endpoint(of: EndpointTally) -> str:
    failed = sum(of.errors.values())
    answered = of.calls - failed
    mean = f", {of.latency_s / answered:.2f} s each" if answered else ""
    return f"{of.calls} calls{mean}" + (f", {failed} failed" if failed else "")


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:.1f}" if seconds > 0 else "-"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
