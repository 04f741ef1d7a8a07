"""Progress a person can follow: a live bar on a terminal, one line now and then in a log, and log.jsonl for the report."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kit import processes
from kit.console import console, say
from kit.errors import UserError
from kit.files import read_jsonl, write_jsonl
from kit.resources import Phases, clock, device_gib, joules, resident_gib

LINES = 20
# Steps whose gradients are looked at, and at most if some tensor had none: LoRA's A gets none in the first steps, where B is zero, and where Unsloth computes
# in float16 without a loss scaler its first ones may all be smaller than float16 can hold.
LOOKED_AT, AT_MOST = 3, 64


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and has saved."""


class Bar:
    """A progress bar with a free text beside it; off-terminal about LINES lines over the whole. `before` were done by an earlier process."""

    def __init__(self, title: str, total: int, before: int = 0) -> None:
        self.title, self.total, self.before, self.said = title, total, before, 0
        self.started = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
        self.live = Progress(*columns, console=console, expand=True, disable=not console.is_terminal)
        self.task = self.live.add_task(title, total=total, completed=before, text="")

    def __enter__(self) -> Bar:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def update(self, done: int, text: str) -> None:
        self.live.update(self.task, completed=done, text=text)
        if not console.is_terminal and (done * LINES // self.total > self.said or done == self.total):
            self.said = done * LINES // self.total
            left = (time.perf_counter() - self.started) / max(done - self.before, 1) * (self.total - done)
            say(f"{self.title} {done}/{self.total}  {text}  {left:.0f} s left")


def compiled() -> int:
    """Graphs that torch has compiled in this process: new shapes are compiled in the middle of training."""
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters["stats"]["unique_graphs"]) if utils else 0


class TrainingProgress:
    """Times the optimiser steps alone, writes log.jsonl and shows the progress.

    Mixed into a transformers TrainerCallback by `kit.training`, so that this module needs no heavy import.
    After training: totals(), final_loss.
    """

    def __init__(self, log: Path, phases: Phases, step: int, earlier_steps: int = 0) -> None:
        """Keeps the log up to the step that training goes on from; `earlier_steps` in it belong to an earlier part of the same training."""
        step, self.earlier_steps = step + earlier_steps, earlier_steps
        self.rows = list(islice(read_jsonl(log), step)) if step and log.exists() else []
        if len(self.rows) < step:
            raise UserError(f"{log} lacks steps that the checkpoint of step {step} has behind it; remove {log.parent} and train again")
        if processes.first():
            write_jsonl(log, self.rows)
        nothing = {"tokens": 0, "supervised": 0, "wall_s": 0.0, "energy_j": 0.0}
        self.earlier: dict[str, Any] = {"energy_j": None, "peak_gib": None} | (self.rows[-1] if self.rows else nothing)
        self.log, self.phases, self.wall_s = log if processes.first() else Path(os.devnull), phases, self.earlier["wall_s"]
        # Tokens of the timed steps: each process's first step, its warm-up, is left out.
        self.timed = Counter[str]()
        for before, row in pairwise(self.rows):
            self._time(before, row)
        self.phase, self.opened = ExitStack(), ExitStack()
        self.stopped = False
        self.fed: dict[str, bool] = {}
        self.starved = self.rows[-1].get("starved") if len(self.rows) > earlier_steps else None
        self.looked = 0

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """The first Ctrl-C, SIGTERM or SIGHUP ends training after the step in hand and a checkpoint; the second ends it at once."""
        earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        if earlier[signal.SIGHUP] == signal.SIG_IGN:  # nohup
            del earlier[signal.SIGHUP]

        def stop(*_: object) -> None:
            say("stopping after this step and a checkpoint; once more stops at once")
            self.stopped = True
            for number in earlier:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

        for number in earlier:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    @property
    def final_loss(self) -> float | None:
        return self.rows[-1]["loss"] if self.rows else None

    def _enter(self, name: str) -> None:
        self.phase.close()
        self.phase.enter_context(self.phases(name))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.bar = self.opened.enter_context(Bar("training", state.max_steps, state.global_step))
        self.joules = joules()
        if self.starved is not None and model is not None:  # by the steps before a kill
            self.fed = {n: n not in self.starved for n, p in model.named_parameters() if p.requires_grad}
        self._enter("warmup")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.graphs = clock(), compiled()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if "warmup" not in self.phases.record:
            self._enter("steps")
        elif compiled() == self.graphs:
            self.wall_s += clock() - self.started
        elif self.timed["steps"]:  # compiling is no part of a step, which counts as the mean of those before
            self.wall_s += self.wall_s / self.timed["steps"]
        # All or none: a process that stopped alone would leave the others waiting for its gradients. A signal that comes meanwhile counts in the next step.
        if any(processes.together([int(self.stopped)], args.device)):
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Notes which trainable tensors have had a gradient that is not zero; a step whose gradients overflow is skipped, and not looked at."""
        if model is None or self.looked == AT_MOST or (self.looked >= LOOKED_AT and all(self.fed.values())):
            return
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        if not all(g is None or bool(g.isfinite().all()) for g in found.values()):
            return
        self.looked += 1
        for name, grad in found.items():
            self.fed[name] = self.fed.get(name, False) or (grad is not None and bool(grad.any()))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" not in logs:
            return
        seen = processes.together([int(n) for n in state.seen], args.device)
        tokens, supervised = (self.earlier[kind] + n for kind, n in zip(("tokens", "supervised"), seen, strict=True))
        if not math.isfinite(logs["loss"]):
            raise UserError(f"training diverged: the loss of step {state.global_step} is {logs['loss']}; lower --learning-rate or raise --warmup-ratio")
        norm = logs.get("grad_norm")
        row = {"step": self.earlier_steps + state.global_step, "loss": logs["loss"], "learning_rate": logs["learning_rate"],
               "grad_norm": norm if norm is not None and math.isfinite(norm) else None,
               "tokens": tokens, "supervised": supervised, "wall_s": self.wall_s, "energy_j": self._energy_j(), "peak_gib": self.peak_gib,
               "starved": [n for n, got in self.fed.items() if not got] if self.fed else None}  # fmt: skip
        self._time(self.rows[-1] if self.rows else row, row)
        self.rows.append(row)
        with self.log.open("a", encoding="utf-8") as file:  # closed each time: network drives keep what is open to themselves, and checkpoints need it
            file.write(json.dumps(row) + "\n")
        speed = self.tokens_per_s() or 0
        self.bar.update(state.global_step, f"loss {row['loss']:.3f} lr {row['learning_rate']:.1e} {speed:.0f} tokens/s {self.memory_gib() or 0:.2f} GiB")

    def memory_gib(self) -> float | None:
        return device_gib()[1] or resident_gib()

    @property
    def peak_gib(self) -> float | None:
        """The peak of all steps so far, those before a kill too."""
        ended = [self.phases.peak_gib(name) for name in ("warmup", "steps") if name in self.phases.record]
        peaks = [self.earlier["peak_gib"], *ended, device_gib()[1] or resident_gib(peak=True)]
        return max((p for p in peaks if p is not None), default=None)

    def _energy_j(self) -> float | None:
        """Energy of all steps so far, in J."""
        before, begun, now = self.earlier["energy_j"], self.joules, joules()
        return None if before is None or begun is None or now is None else before + now - begun

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.phase.close()
        self.close()

    def close(self) -> None:
        """Ends the display and the log, also after a stop in the middle."""
        self.opened.close()

    def tokens_per_s(self, kind: str = "tokens") -> float | None:
        """Unpadded tokens a second over the timed steps."""
        return self.timed[kind] / self.wall_s if self.timed[kind] else None

    def _time(self, before: dict[str, Any], row: dict[str, Any]) -> None:
        if row["wall_s"] > before["wall_s"]:
            self.timed.update({kind: row[kind] - before[kind] for kind in ("tokens", "supervised")} | {"steps": 1})

    def totals(self) -> dict[str, Any]:
        """What all steps needed, those before a kill too."""
        last = self.rows[-1]
        return {"steps": last["step"], "train_wall_s": last["wall_s"], "tokens_total": last["tokens"], "tokens_supervised": last["supervised"],
                "tokens_per_s": self.tokens_per_s(), "supervised_per_s": self.tokens_per_s("supervised"), "peak_memory_gib": last["peak_gib"]}  # fmt: skip
