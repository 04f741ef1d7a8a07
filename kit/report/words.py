"""The report's turns of phrase."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kit.config import BASE
from kit.report.rows import COLUMNS, Row, title
from kit.report.verdicts import Verdict

BUILT_IN = "The model is built in to show that everything works: its scores say nothing about real models."


def names(items: Sequence[str]) -> str:
    """A, B and C."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def name(method: str) -> str:
    return "the base model" if method == BASE else title(method)


def counted(n: int, one: str, several: str) -> str:
    """1 row is, 2 rows are."""
    return f"{n:,} {one if n == 1 else several}"


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def called(metrics: Sequence[str]) -> str:
    return names([COLUMNS[m].title for m in metrics])


def percent(log_percent: float) -> float:
    """A difference of logarithms, 100 times, in percent of the score itself."""
    return 100 * math.expm1(min(log_percent, 1000.0) / 100)


def change(v: Verdict) -> str:
    """A difference with its interval, signs written out; one of logarithms in percent of the score itself."""
    if v.get("unit") == "log %":
        found = [percent(v[k]) for k in ("delta", "low", "high")]
        return "{:+,.1f}% [{:,.1f}%, {:,.1f}%]".format(*found).replace("-", "−")
    return f"{v['delta']:+.1f} [{v['low']:.1f}, {v['high']:.1f}]".replace("-", "−")


def on(v: Verdict) -> str:
    return f"{COLUMNS[v['metric']].title}, {change(v)}"


def built_in(rows: Sequence[Row]) -> bool:
    return any(str((r["config"] or {}).get("model", "")).startswith("builtin") for r in rows)
