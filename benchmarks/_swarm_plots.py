"""Plots of `swarm_simulation.py`; needs matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

SIZE_INCHES = (8.0, 4.0)
DPI = 110


def plot_all(folder: Path, results: dict[str, Any], curves: Sequence[dict[str, list[Any]]]) -> None:
    """Write the PNG files for what was measured; others stay as they are.

    Args:
        curves: for each swarm, samples by strategy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if curves:
        plot_throughput(folder / "simulation_throughput.png", curves[-2 if len(curves) > 1 else 0])
        plot_shares(folder / "simulation_shares.png", results["churn"])
    if "scale" in results:
        plot_scale(folder / "simulation_scale.png", results["scale"])


def plot_throughput(path: Path, samples_of: dict[str, list[Any]]) -> None:
    """Throughput over time of each strategy, and the bound."""
    figure, axes = pyplot.subplots(figsize=SIZE_INCHES)
    longest = list(samples_of.values())[-1]
    hours = [(sample.at_s - longest[0].at_s) / 3600 for sample in longest]
    axes.plot(hours, [sample.bound for sample in longest], color="black", linewidth=1, label="bound")
    for strategy, samples in samples_of.items():
        axes.plot(hours, [sample.throughput for sample in samples], linewidth=1, label=strategy)
    axes.set_xlabel("hours")
    axes.set_ylabel("tokens/s through the weakest block")
    axes.set_title(f"{longest[0].num_peers} peers at the start")
    axes.set_ylim(bottom=0)
    save(figure, axes, path)


def plot_shares(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Mean share of the bound, by swarm and strategy."""
    figure, axes = pyplot.subplots(figsize=SIZE_INCHES)
    swarms = list(dict.fromkeys((row["peers"], row["mean life h"]) for row in rows))
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    width = 0.8 / len(strategies)
    for number, strategy in enumerate(strategies):
        found = [(swarms.index((row["peers"], row["mean life h"])), row) for row in rows if row["strategy"] == strategy]
        places = [swarm + (number - (len(strategies) - 1) / 2) * width for swarm, _ in found]
        axes.bar(places, [row["share of bound"] for _, row in found], width, label=strategy)
    axes.axhline(0.9, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(swarms)), [f"{peers} peers, stay {life:g} h" for peers, life in swarms])
    axes.set_ylabel("share of the bound, mean")
    axes.set_ylim(0, 1)
    save(figure, axes, path)


def plot_scale(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """What a tracker takes, by swarm size."""
    figure, axes = pyplot.subplots(figsize=SIZE_INCHES)
    peers = [row["peers"] for row in rows]
    for name in ("announces/s", "record KB/s", "lookups/s", "lookup MB/s", "peak MB"):
        axes.plot(peers, [row[name] for row in rows], marker="o", label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("peers")
    save(figure, axes, path)


def save(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    pyplot.close(figure)
