"""Variants take turns A B A B in one process: medians, spread, the median of the paired ratios; peak memory of each in a process of its own."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from typing import Any

from kit.config import RunConfig
from kit.console import say
from kit.resources import Phases, clock
from kit.runs import machine, versions

Variants = Mapping[str, Callable[[], object]]
Times = dict[str, list[float]]
Peaks = dict[str, float | None]
# In a process that measures the memory of one variant: that variant's name.
ALONE: list[str] = []
# The only variants that are asked for: those with one of these in their names; all of them if there is none.
ONLY: list[str] = []


def interleave(variants: Variants, rounds: int, *, now: Callable[[], float] = clock, turning: bool = False) -> tuple[Times, Peaks]:
    """(seconds of each round by the clock `now`, peak memory in GiB) by variant; a first round warms up and is left out.

    Peaks are None here, where all share a process: `measure` finds each in a process that runs that variant alone. What only one
    variant needs is best made in its first call. With `turning` every other round is in reverse order.
    """
    if ALONE:
        name = ALONE[0]
        phases = Phases()
        for phase in ("warmup", "round"):
            with phases(phase):
                started = clock()
                variants[name]()
        return {name: [clock() - started]}, {name: phases.peak_gib("round")}
    times: Times = {name: [] for name in variants}
    for number in range(rounds + 1):
        order = list(variants)
        if turning and number % 2 == 0:
            order.reverse()
        for name in order:
            started = now()
            variants[name]()
            taken = now() - started
            if number:
                times[name].append(taken)
        say(f"round {number} of {rounds}: " + (", ".join(f"{n} {t[-1]:.3f} s" for n, t in times.items() if t) or "warm-up"))
    return times, dict.fromkeys(variants)


def summary(what: str, times: Mapping[str, Sequence[float]], peaks: Peaks, ratios: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """{what, machine, versions, variants: {name: {median_s, iqr_s, peak_memory_gib, n}}, ratios: {"a/b": median of the paired ratios}}."""
    variants = {n: {"median_s": statistics.median(t), "iqr_s": iqr(t), "peak_memory_gib": peaks.get(n), "n": len(t)} for n, t in times.items()}
    paired = {f"{a}/{b}": statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)) for a, b in ratios if {a, b} <= times.keys()}
    # As torch chooses its threads: one a core, unless told otherwise.
    cores = len(os.sched_getaffinity(0))
    used = machine() | {"cores": cores, "threads": int(os.environ.get("OMP_NUM_THREADS", cores))}
    return {"what": what, "machine": used, "versions": versions(), "variants": variants, "ratios": paired}


def iqr(values: Sequence[float]) -> float | None:
    """The distance between the quartiles, None for a single value."""
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def measure(what: str, config: RunConfig, rounds: int, arguments: Sequence[str]) -> dict[str, Any]:
    """A bench's summary with schema, date and command, and with the peak memory that every variant has alone where the bench did not find it."""
    from kit.bench import BENCHES

    date = datetime.now(UTC).isoformat(timespec="seconds")
    found = BENCHES[what](config, rounds)
    for name, variant in found["variants"].items():
        if variant["peak_memory_gib"] is None:
            say(f"memory of {name}, alone")
            variant["peak_memory_gib"] = peak_alone(what, config, name)
    return {"schema": 1, "date": date, "command": shlex.join(["python", "scripts/bench.py", *arguments]), **found}


def peak_alone(what: str, config: RunConfig, variant: str) -> float | None:
    """Peak memory in GiB of a new process in which a bench runs one variant alone, once after a warm-up."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_alone, what, config, variant).result()


def _alone(what: str, config: RunConfig, variant: str) -> float | None:
    from kit.bench import BENCHES

    ALONE[:] = [variant]
    with contextlib.redirect_stdout(io.StringIO()):
        peak: float | None = BENCHES[what](config, 1)["variants"][variant]["peak_memory_gib"]
    return peak
