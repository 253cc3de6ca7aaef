"""Draws the tables of the scale benchmark, one column of panels for each sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ACROSS = {
    "workers": "workers",
    "runs": "runs",
    "roles": "roles",
    "row_bytes": "row_bytes",
    "in_flight": "in_flight",
}
"""The column that each sweep varies."""
_DRAWN = (
    ("hops/s", ("hops_per_s",)),
    ("CPU, µs per hop", ("worker_cpu_us_per_hop", "broker_cpu_us_per_hop")),
    ("worker RSS, MiB", ("worker_rss_mib",)),
)


def draw(sweeps: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Writes a picture of the sweeps to `path`. Raises `SystemExit` without matplotlib."""
    try:
        import matplotlib as mpl  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(_DRAWN), len(sweeps), figsize=(3.6 * len(sweeps), 7.5), squeeze=False, layout="constrained"
    )
    for column, (name, points) in enumerate(sweeps.items()):
        for row, (label, fields) in enumerate(_DRAWN):
            panel = panels[row][column]
            for kind, some in _lines(name, points).items():
                for field in fields:
                    words = [field.partition("_")[0]] if len(fields) > 1 else []
                    panel.plot(
                        [point[_ACROSS[name]] for point in some],
                        [point[field] for point in some],
                        marker="o",
                        label=", ".join([*words, *([kind] if kind else [])]),
                    )
            panel.set_xscale("log")
            at = sorted({point[_ACROSS[name]] for point in points})
            panel.set_xticks(at, [_short(value) for value in at])
            panel.minorticks_off()
            panel.margins(y=0.15)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(label)
            if row == 0:
                panel.set_title(name.replace("_", " "))
            if any(panel.get_legend_handles_labels()[1]):
                panel.legend(fontsize="small")
        panels[-1][column].set_xlabel(_ACROSS[name].replace("_", " "))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _short(value: int) -> str:
    for unit, size in (("M", 1 << 20), ("k", 1 << 10), ("000", 1000)):
        if value >= size and value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


def _lines(name: str, points: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Points that belong on one line, by what tells the lines apart."""
    if name != "row_bytes":
        return {"": list(points)}
    found: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        offloaded = point["offload_above_bytes"] < point["row_bytes"]
        found.setdefault("offloaded" if offloaded else "in the message", []).append(point)
    return found
