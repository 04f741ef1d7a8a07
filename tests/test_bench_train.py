"""The training benches: both sides train on the same tokens, only one of them has Unsloth, and the figure shows what was measured."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, config, in_process, places

from kit.bench.shapes import SHAPES
from kit.bench.turns import Job, Side, Step, alternate, serve, sides
from kit.config import RunConfig
from kit.errors import UserError
from kit.files import read_json
from kit.prompts import Example

Make = Callable[..., RunConfig]
train = importlib.import_module("kit.bench.train")
scaling = importlib.import_module("kit.bench.scaling")


class Trainer:
    """As much of a trainer as takes turns: three optimiser steps of two batches each."""

    def __init__(self, fails: BaseException | None = None) -> None:
        self.callback_handler, self.fails = SimpleNamespace(callbacks=[]), fails

    def training_step(self, model: Any, inputs: Any) -> Any:
        import torch

        if self.fails:
            raise self.fails
        return torch.tensor(1.0)

    def train(self) -> None:
        import torch

        turns = self.callback_handler.callbacks[0]
        turns.on_train_begin(None, None, None)
        for number in range(1, 4):
            for _ in range(2):
                mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
                self.training_step(None, {"attention_mask": mask, "labels": torch.where(mask == 1, 5, -100)})
            turns.on_step_end(None, SimpleNamespace(global_step=number, max_steps=3), None)


def well(*_: Any) -> Any:
    return Trainer()


def out_of_memory(*_: Any) -> Any:
    import torch

    return Trainer(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))


def wrong(*_: Any) -> Any:
    return Trainer(ZeroDivisionError("a fault"))


def killed(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def threaded(jobs: list[Job]) -> Side:
    """A side served by a thread, which spares the test a process and its imports."""
    from transformers import TrainerCallback  # noqa: F401  # two threads that import it at once trip over its lazy module

    side = Side.__new__(Side)
    side.pipe, theirs = multiprocessing.Pipe()
    threading.Thread(target=serve, args=(theirs, jobs), name="side", daemon=True).start()
    return side


def test_sides_take_turns_and_tell_what_a_step_was_made_of(tiny: Make) -> None:
    work = [Job(well, tiny(), [Example([1], [1], "whole")] * 26)]
    assert work[0].steps == 3  # of 8 rows; two are left over
    made = alternate({"a": threaded(work), "b": (twice := threaded(work * 2))}, 3)
    made["b"] += [twice.step() for _ in range(3)]
    assert [(s.tokens, s.supervised, s.padded, s.loss) for s in made["a"]] == [(8, 8, 12, 2.0)] * 3
    assert len(made["b"]) == 6
    assert all(s.seconds > 0 and s.peak_gib for steps in made.values() for s in steps)


@pytest.mark.parametrize(("make", "error", "text"), [(out_of_memory, MemoryError, "Tried to allocate"), (wrong, RuntimeError, "a fault")])
def test_a_side_that_fails_says_why(tiny: Make, make: Any, error: type[BaseException], text: str) -> None:
    with pytest.raises(error, match=text):
        alternate({"a": threaded([Job(make, tiny(), [])])}, 1)


def test_a_side_that_ended_before_its_turn_says_why() -> None:
    side = threaded([Job(None, config(), [])])  # type: ignore[arg-type]
    while any(t.name == "side" for t in threading.enumerate()):
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="'NoneType' object is not callable"):
        side.step()


def test_a_side_that_is_killed_is_noticed(tiny: Make) -> None:
    with sides({"a": [Job(killed, tiny(), [])]}) as opened, pytest.raises(UserError, match="was killed, most likely for want of memory"):
        alternate(opened, 1)


def test_a_method_that_does_not_fit_is_left_out_with_the_reason(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def compared(config: RunConfig, rounds: int) -> dict[str, list[list[Step]]]:
        if config.method == "full":
            raise MemoryError("no room")
        step = {"kit": Step(1, 80, 40, 100, 1.0, 2.0), "plain": Step(2, 80, 40, 160, 1.0, 2.0)}
        return {f"{config.method} {side}": [[made]] * rounds for side, made in step.items()}

    monkeypatch.setattr(train, "compare", compared)
    found = train.train(tiny("--method", "base"), 2)
    assert found["skipped"] == {"full": "out of memory: no room"}
    assert found["ratios"] == {"qlora kit/qlora plain": 0.5, "lora kit/lora plain": 0.5, "dora kit/dora plain": 0.5}
    assert found["variants"]["dora plain"] == {
        "median_s": 2, "iqr_s": 0.0, "peak_memory_gib": 2.0, "n": 2, "tokens_per_s": 40.0, "padding_share": 0.5, "loss": 1.0
    }  # fmt: skip
    assert set(train.train(tiny("--method", "galore"), 1)["skipped"]) == {"galore"}


def kit_with_unsloth(*args: Any) -> Any:
    trainer = train.kit_trainer(*args)
    assert "unsloth" in sys.modules
    return trainer


def plain_without_unsloth(*args: Any) -> Any:
    trainer = train.plain_trainer(*args)
    assert "unsloth" not in sys.modules
    return trainer


def bench(what: str, folder: Path, *flags: str) -> dict[str, Any]:
    """What `python scripts/bench.py WHAT` writes."""
    words = (ROOT / "scripts" / "bench.py", what, "--recipe", "tiny", "--rounds", "1", "--json", folder / "found.json", *places(folder), *flags)
    assert in_process(words) == 0
    return dict(read_json(folder / "found.json"))


def test_both_sides_train_on_the_same_tokens_and_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QLoRA, the method with most to go wrong; and only one of the processes has Unsloth in it. (The bench itself refuses other tokens.)"""
    monkeypatch.setattr(train, "kit_trainer", kit_with_unsloth)
    monkeypatch.setattr(train, "plain_trainer", plain_without_unsloth)
    data = ("--train-per-source", "30", "--test-per-source", "4", "--valid-per-source", "0")
    found = bench("train", tmp_path, "--method", "qlora", *data, "--limit-train", "35")
    assert list(found["ratios"]) == ["qlora kit/qlora plain"]
    kit, plain = (found["variants"][f"qlora {side}"] for side in ("kit", "plain"))
    assert kit["tokens_per_s"] * kit["median_s"] == pytest.approx(plain["tokens_per_s"] * plain["median_s"])
    assert kit["padding_share"] < plain["padding_share"]
    # An untrained model of this vocabulary loses log(965) = 6.9 nats a token.
    assert 0 < kit["loss"] < 6
    assert kit["loss"] == pytest.approx(plain["loss"], rel=0.2)
    assert kit["peak_memory_gib"] > 0 < plain["peak_memory_gib"]


def test_a_shape_is_loaded_by_the_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = SHAPES["gemma-3-1b"] | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "query_pre_attn_scalar": 16, "vocab_size": 1024}
    monkeypatch.setitem(SHAPES, "gemma-3-1b", small)
    monkeypatch.setattr(scaling, "AXES", {"rows": (8,), "length": (32,), "rank": (2, 4)})
    monkeypatch.setattr(scaling, "STANDARD", {"rows": 8, "length": 32, "rank": 4})
    found = bench("scaling", tmp_path, "--method", "lora", "--model-config", "gemma-3-1b", "--layers", "2")
    assert list(found["variants"]) == ["lora rows 8", "lora length 32", "lora rank 2", "lora rank 4"]
    assert all(v["tokens_per_s"] > 0 and v["n"] == 1 for v in found["variants"].values())
    assert (tmp_path / "found.png").exists()


def test_the_figure_of_scaling(tmp_path: Path) -> None:
    def steps(seconds: float) -> list[Step]:
        return [Step(seconds, 1000, 500, 1000, 1.0, 1.5)] * 3

    made = {(m, axis, value): steps(k + value / 100) for k, m in enumerate(("lora", "dora")) for axis, values in scaling.AXES.items() for value in values}
    found = scaling.told(made, {"lora": 8, "dora": 8})
    assert found["variants"]["dora rows 64"]["epoch_s"] == pytest.approx(1.64 * 8)
    assert found["variants"]["lora length 64"]["epoch_s"] == pytest.approx(0.64 * 4)
    assert found["ratios"]["dora rank 32/lora rank 32"] == pytest.approx(1.32 / 0.32)
    # Three rows of panels share their heights: every point of each lies inside, also where a later panel reaches higher.
    found["variants"]["dora length 512"]["peak_memory_gib"] = 9.0
    for axes in scaling.chart(found).axes:
        low, high = axes.get_ylim()
        assert all(low <= y <= high for line in axes.lines for y in line.get_ydata())
    files = scaling.draw(found, tmp_path / "scaling.json")
    assert [f.name for f in files] == ["scaling.png", "scaling.svg"]
    text = files[1].read_text()
    assert all(label in text for label in ("DoRA", "LoRA", "time of an epoch (s)", "peak memory (GiB)", "training rows"))
    first = [f.read_bytes() for f in files]
    assert [f.read_bytes() for f in scaling.draw(found, tmp_path / "scaling.json")] == first
