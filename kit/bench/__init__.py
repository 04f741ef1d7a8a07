"""Both sides of every claim of speed, interleaved. BENCHES is the registry: a bench is one function of a configuration and a number of rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kit.bench.data import data
from kit.bench.dora import dora
from kit.bench.generate import generate
from kit.bench.metrics import metrics
from kit.bench.report import report
from kit.bench.scaling import scaling
from kit.bench.startup import startup
from kit.bench.train import train
from kit.config import RunConfig

BENCHES: dict[str, Callable[[RunConfig, int], dict[str, Any]]] = {
    "data": data, "dora": dora, "generate": generate, "metrics": metrics, "report": report, "scaling": scaling, "startup": startup, "train": train,
}  # fmt: skip
# Timed rounds unless --rounds says otherwise.
ROUNDS = {"data": 3, "dora": 3, "generate": 3, "metrics": 5, "report": 1, "scaling": 1, "startup": 10, "train": 3}
# Benches that go through the methods unless --method names one.
OF_METHODS = ("train", "scaling")
