"""What several benchmarks share: bars, the line of JSON and the block of markdown at the end, the machine's name."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

__all__ = ["Bar", "machine", "print_report", "quantile", "say", "table"]


@dataclass(frozen=True, slots=True)
class Bar:
    """What one figure must be.

    Attributes:
        figure: what was measured; None if it was not.
    """

    name: str
    figure: float | None
    compare: Literal[">=", "<="]
    bar: float

    @property
    def is_met(self) -> bool:
        if self.figure is None:
            return False
        return self.figure >= self.bar if self.compare == ">=" else self.figure <= self.bar


def machine() -> str:
    """Cores, processor, torch, load and date: what a figure is worth nothing without."""
    cores, load = os.cpu_count(), os.getloadavg()[0]
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return f"{cores} cores {_processor()}, torch {torch.__version__}, load {load:.1f} at the end, {today}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * share // 1).__int__() - 1)]


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def print_report(result: dict[str, Any], bars: Sequence[Bar], markdown: str) -> int:
    """JSON on stdout, markdown on stderr; the exit status: 1 if a bar is missed."""
    checks = [{**asdict(bar), "is_met": bar.is_met} for bar in bars]
    print(json.dumps({**result, "machine": machine(), "bars": checks, "passed": all(bar.is_met for bar in bars)}))
    sys.stdout.flush()
    rows = [
        (bar.name, "not measured" if bar.figure is None else f"{bar.figure:.3g}", f"{bar.compare} {bar.bar:g}",
         "yes" if bar.is_met else "**no**")
        for bar in bars
    ]  # fmt: skip
    say(f"\n{markdown}\n\n{table(['figure', 'measured', 'bar', 'met'], rows)}\n\n{machine()}.")
    return 0 if all(bar.is_met for bar in bars) else 1
