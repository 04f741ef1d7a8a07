"""Training by several processes, as torchrun starts them: one set of files, and the training that one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, config, places

from kit.errors import UserError
from kit.evaluation import evaluate
from kit.files import read_json, read_jsonl
from kit.processes import restore_numbered_cpus
from kit.progress import TrainingProgress
from kit.prompts import IGNORE, Example
from kit.resources import Phases, joules
from kit.trainer import make_trainer
from kit.training import train

SHORT = ("--recipe", "tiny", "--method", "lora", "--train-per-source", "14", "--valid-per-source", "1", "--test-per-source", "2",
         "--max-length", "96", "--micro-batch", "2", "--accumulation", "4")  # fmt: skip


def together(*flags: str) -> subprocess.CompletedProcess[str]:
    """train.py in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "scripts" / "train.py")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *flags], env=env, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    alone = config(*SHORT, *places(tmp_path), "--runs-dir", str(tmp_path / "alone"))
    train(alone)
    done = together(*SHORT, *places(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    both = tmp_path / "runs" / "tiny" / "lora-s0"
    logs = [list(read_jsonl(folder / "log.jsonl")) for folder in (alone.run_dir, both)]
    assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]]
    for key, closeness in (("tokens", 0), ("supervised", 0), ("learning_rate", 1e-9), ("loss", 1e-3)):
        assert [r[key] for r in logs[1]] == pytest.approx([r[key] for r in logs[0]], rel=closeness), key
    records = [read_json(folder / "train.json") for folder in (alone.run_dir, both)]
    assert [r["steps"] for r in records] == [5, 5]
    assert {g["passed"] for g in records[1]["gates"].values()} <= {True, None}
    assert done.stdout.count("supervised text: ") == 1  # one process speaks


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = (*SHORT, *places(tmp_path), "--save-steps", "2")
    alone, stopped = config(*flags, "--runs-dir", str(tmp_path / "alone")), config(*flags)
    train(alone)
    on_log = TrainingProgress.on_log

    def until_3(self: TrainingProgress, args: Any, state: Any, *others: Any, **logs: Any) -> None:
        on_log(self, args, state, *others, **logs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingProgress, "on_log", until_3)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    damaged = stopped.run_dir / "checkpoints" / "checkpoint-4"
    damaged.mkdir()
    for name in ("optimizer.pt", "trainer_state.json"):
        (damaged / name).write_text("{}")
    done = together(*flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "checkpoint-4 is damaged" in done.stdout.replace("\n", "")
    assert "going on from checkpoint-2" in done.stdout
    losses = [[r["loss"] for r in read_jsonl(run.run_dir / "log.jsonl")] for run in (alone, stopped)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_checkpoint_is_restored_to_a_cpu_with_a_number(tmp_path: Path) -> None:
    import torch

    torch.save({"moment": torch.ones(2)}, tmp_path / "optimizer.pt")
    restore_numbered_cpus()
    assert torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu", 1), weights_only=True)["moment"].tolist() == [1, 1]


def test_when_one_process_is_told_to_stop_all_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The signal may reach them in different steps; one that stopped alone would leave the others waiting for its gradients."""
    phases = Phases()
    for told in (0, 1):
        phases.record["warmup"] = {}
        progress = TrainingProgress(tmp_path / "log.jsonl", phases, 0)
        progress.on_step_begin(None, None, None)
        monkeypatch.setattr("kit.processes.together", lambda numbers, _, told=told: (sum(numbers) + told,))
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        progress.on_step_end(SimpleNamespace(device="cpu"), None, control)
        assert (control.should_save, control.should_training_stop, progress.stopped) == (bool(told),) * 3


def test_a_signal_that_comes_while_they_meet_counts_in_the_next_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    phases = Phases()
    phases.record["warmup"] = {}
    progress = TrainingProgress(tmp_path / "log.jsonl", phases, 0)

    def meeting(numbers: list[int], _: object) -> tuple[int, ...]:
        progress.stopped = True  # as the handler does
        return tuple(numbers)

    monkeypatch.setattr("kit.processes.together", meeting)
    stops = []
    for _ in range(2):
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        progress.on_step_begin(None, None, None)
        progress.on_step_end(SimpleNamespace(device="cpu"), None, control)
        stops.append(control.should_training_stop)
    assert stops == [False, True]


def test_one_gpus_energy_is_not_that_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kit.resources._nvml", lambda: (SimpleNamespace(nvmlDeviceGetTotalEnergyConsumption=lambda _: 5000), None))
    assert joules() == 5.0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert joules() is None


def test_what_processes_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    for flags, message in (
        ((), "--accumulation 4 cannot be shared by 3 processes"),
        (("--method", "hybrid", "--accumulation", "6"), "hybrid runs in one process"),
    ):
        with pytest.raises(UserError, match=message):
            train(config(*SHORT, *places(tmp_path), *flags))
    with pytest.raises(UserError, match="an evaluation runs in one process"):
        evaluate(config(*SHORT, *places(tmp_path)))


def test_rows_that_processes_cannot_share_are_refused_and_not_seen_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    examples = [Example([1, 2], [IGNORE, 2], "whole")] * 5
    with pytest.raises(UserError, match=r"5 training rows, .* cannot be shared by 2 processes"):
        make_trainer(config(*SHORT), None, None, examples, tmp_path, precision="float32")
