"""What only a GPU shows: make test ARGS="-m gpu". They compile for minutes each; with room for several at once: ARGS="-m gpu -n 8 --dist load"."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import places, script

from kit.device import cuda_gpu
from kit.files import read_json, read_jsonl
from kit.methods import METHODS

forced = os.environ.pop("UNSLOTH_FORCE_CPU", None)
GPU, REASON = cuda_gpu()
if forced is not None:
    os.environ["UNSLOTH_FORCE_CPU"] = forced
ON_GPU = {"UNSLOTH_FORCE_CPU": "0"}
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPU is None, reason=f"needs a CUDA GPU: {REASON}")]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "combined"])  # which trains nothing itself
def test_every_method_trains_and_answers(tmp_path: Path, method: str) -> None:
    flags = ("--recipe", "tiny", "--method", method, "--limit-train", "480", "--limit-test", "48", *places(tmp_path))
    for name in ("train", "eval"):
        done = script(name, *flags, env=ON_GPU, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    run = tmp_path / "runs" / "tiny" / f"{method}-s0"
    record = read_json(run / "train.json")
    assert record["provenance"]["gpu"]
    assert record["phases"]["steps"]["peak_reserved_gib"] > 0
    losses = [r["loss"] for r in read_jsonl(run / "log.jsonl")]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert read_json(run / "eval.json")["generation"]["empty"] < 24
