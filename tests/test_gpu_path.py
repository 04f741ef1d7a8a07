"""What a GPU run does in Unsloth's code, done on a CPU (pretend_gpu.py): for a T4, which has no bfloat16, and for a newer card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, config, places

from kit.files import read_json, read_jsonl
from kit.training import train

DATA = ("--train-per-source", "4", "--valid-per-source", "1", "--test-per-source", "1", "--max-length", "96", "--micro-batch", "2")
SHORT = ("--recipe", "tiny", *DATA, "--gradient-checkpointing", "--max-new-tokens", "4", "--forgetting-text", "none")


def pretended(capability: str, folder: Path, *stages: tuple[str, ...]) -> list[Any]:
    """Runs (script, method, flags) one after the other; (class's module, attention, kept in float32, layers as regions) of each model that was loaded."""
    words = [word for name, method, *flags in stages for word in ("--", name, "--method", method, *SHORT, *places(folder), *flags)]
    env = os.environ | {"UNSLOTH_COMPILE_LOCATION": str(folder / "compiled")}
    command = [sys.executable, str(ROOT / "tests" / "pretend_gpu.py"), capability, *words[1:]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def gates(folder: Path, run: str, stage: str) -> dict[str, bool | None]:
    return {name: gate["passed"] for name, gate in read_json(folder / "runs" / "tiny" / run / f"{stage}.json")["gates"].items()}


def losses(folder: Path, method: str) -> list[list[float]]:
    """Of a method's run on the pretended GPU, and of the same on the CPU."""
    on_cpu = config(*SHORT, "--method", method, *places(folder), "--runs-dir", str(folder / "cpu"))
    train(on_cpu)
    return [[r["loss"] for r in read_jsonl(f / "log.jsonl")] for f in (folder / "runs" / "tiny" / f"{method}-s0", on_cpu.run_dir)]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "adapter", "attention"), [("7.5", "qdora", ["eager"] * 3), ("9.0", "lora", ["flex_attention", "sdpa", "sdpa"])])
def test_adapters_and_whole_weights(capability: str, adapter: str, attention: list[str], tmp_path: Path) -> None:
    """Unsloth's compiled class, whose fused loss never holds all logits, is the one in use; losses are a CPU's, and every check of a run is passed."""
    loaded = pretended(capability, tmp_path, ("train", adapter), ("eval", adapter), ("train", "galore"))
    forced = capability == "7.5"
    assert loaded == [["unsloth_compiled_module_gemma3", a, forced, not forced] for a in attention]
    assert set(gates(tmp_path, f"{adapter}-s0", "eval").values()) == {True}
    for run in (f"{adapter}-s0", "galore-s0"):
        found = gates(tmp_path, run, "train")
        assert {name for name, passed in found.items() if passed} == found.keys() - {"learning_rate"}
    assert read_json(tmp_path / "runs" / "tiny" / f"{adapter}-s0" / "train.json")["precision"]["name"] == ("float16" if forced else "bfloat16")
    gpu, cpu = losses(tmp_path, adapter)
    assert gpu == pytest.approx(cpu, rel=0.01)


@pytest.mark.slow
def test_float32_on_a_newer_card_is_float32(tmp_path: Path) -> None:
    """Unsloth would turn bfloat16 autocast on, under which flex attention refuses what Gemma 3's norms give."""
    pretended("9.0", tmp_path, *(("train", method, "--precision", "float32") for method in ("lora", "full")))
    for method in ("lora", "full"):
        gpu, cpu = losses(tmp_path, method)
        assert gpu == pytest.approx(cpu, rel=1e-4)
