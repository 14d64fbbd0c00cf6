"""Plots of `suite.py`; needs matplotlib (the extra `plots`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _swarm_plots import SIZE_INCHES, save
from matplotlib import pyplot

__all__ = ["plot_suite"]

PARTS = ("wire", "queue", "compute")


def plot_suite(folder: Path, results: dict[str, Any]) -> None:
    """Write ``suite_<scenario>.png`` for each scenario, and ``suite_waterfall.png``."""
    for name in next(iter(results.values()), {}):
        plot_arms(folder / f"suite_{name}.png", name, {profile: found[name] for profile, found in results.items()})
    tokens = {profile: found["decode"]["waterfall"] for profile, found in results.items() if "decode" in found}
    if tokens:
        plot_waterfall(folder / "suite_waterfall.png", tokens)


def plot_arms(path: Path, scenario: str, by_profile: dict[str, Any]) -> None:
    """Bars of the medians, with least and most."""
    figure, axes = pyplot.subplots(figsize=SIZE_INCHES)
    names = [
        f"{row['arm']} (paced)" if row["is_paced"] else row["arm"] for row in next(iter(by_profile.values()))["arms"]
    ]
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        rows = [found["arms"][number] for found in by_profile.values()]
        heights = [1e3 * row["median_s"] for row in rows]
        spread = [
            [height - 1e3 * row["min_s"] for row, height in zip(rows, heights, strict=True)],
            [1e3 * row["max_s"] - height for row, height in zip(rows, heights, strict=True)],
        ]
        places = [profile + (number - (len(names) - 1) / 2) * width for profile in range(len(rows))]
        axes.bar(places, heights, width, yerr=spread, label=name)
    axes.set_xticks(range(len(by_profile)), list(by_profile))
    axes.set_ylabel("ms to the first token" if scenario == "prefill" else "ms for each token")
    axes.set_yscale("log")
    save(figure, axes, path)


def plot_waterfall(path: Path, tokens: dict[str, Any]) -> None:
    """What a token waits for, hop by hop, from left to right."""
    figure, axes = pyplot.subplots(figsize=SIZE_INCHES)
    colours = dict(zip(PARTS, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    shown: set[str] = set()
    for row, hops in enumerate(tokens.values()):
        left = 0.0
        for hop in hops:
            for part in PARTS:
                width = 1e3 * hop[part]
                name = "client" if hop["hop"] == "client" else part
                colour = "tab:gray" if name == "client" else colours[part]
                if width:
                    axes.barh(row, width, left=left, color=colour, label="_" if name in shown else name)
                    shown.add(name)
                left += width
    axes.set_yticks(range(len(tokens)), list(tokens))
    axes.set_xlabel("ms of a token, medians")
    save(figure, axes, path)
