"""Replies by vLLM in a Python of its own. vLLM itself is not here: a stand-in with its interface, run by transformers, takes its place."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import external
from kit.config import RunConfig
from kit.device import Choice
from kit.errors import UserError
from kit.evaluation import evaluate
from kit.files import read_jsonl

Make = Callable[..., RunConfig]
STAND_IN = """
from types import SimpleNamespace

class SamplingParams:
    def __init__(self, temperature, max_tokens, stop_token_ids, detokenize):
        assert temperature == 0 and not detokenize
        self.n, self.stop = max_tokens, stop_token_ids

class LLM:
    def __init__(self, model, revision, dtype, max_model_len, seed, trust_remote_code):
        import torch
        from transformers import AutoModelForCausalLM

        assert not trust_remote_code and max_model_len == 264
        self.model = AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=getattr(torch, dtype))
    def generate(self, prompts, params):
        import torch

        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            out = self.model.generate(ids, max_new_tokens=params.n, do_sample=False, eos_token_id=params.stop, pad_token_id=0)
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=out[0, ids.shape[1]:].tolist())])
"""


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm.py").write_text(STAND_IN)
    monkeypatch.setenv("VLLM_PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")])))


@pytest.mark.usefixtures("vllm")
def test_replies_of_the_other_engine_are_scored_as_the_kits_are(tiny: Make) -> None:
    flags = ("--method", "base", "--limit", "9", "--max-new-tokens", "8", "--forgetting-text", "none")
    own, other = tiny(*flags, "--name", "own"), tiny(*flags, "--name", "other", "--engine", "vllm")
    evaluate(own)
    record = evaluate(other)
    assert record["generation"]["peak_memory_gib"] is None
    assert record["phases"]["engine"]["wall_s"] > 0
    kept = [{r["id"]: (r["prediction"], r["finished"]) for r in read_jsonl(c.run_dir / "predictions.jsonl")} for c in (own, other)]
    assert len(kept[0]) == 9
    assert kept[0] == kept[1]
    assert not list(other.run_dir.glob(".vllm*"))


def test_without_vllm_it_says_what_to_install(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PYTHON", sys.executable)
    with pytest.raises(UserError, match=r"cannot import vllm \(ModuleNotFoundError.*set VLLM_PYTHON"):
        external.check(tiny("--engine", "vllm"))
    monkeypatch.setenv("VLLM_PYTHON", "/no/such/python")
    with pytest.raises(UserError, match="/no/such/python cannot import vllm"):
        external.check(tiny("--engine", "vllm"))


@pytest.mark.usefixtures("vllm")
def test_a_t4s_float16_is_refused_for_gemma_3(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from kit.device import choose_precision

    monkeypatch.setattr("kit.device.cuda_gpu", lambda: (type("Gpu", (), {"name": "T4", "capability": (7, 5)}), ""))
    assert choose_precision("gemma3_text").name == "float16"
    for chosen in (choose_precision("gemma3_text"), Choice("float16", "as asked for")):
        monkeypatch.setattr(external, "precision", lambda *_, chosen=chosen, **__: chosen)
        with pytest.raises(UserError, match="vLLM refuses float16 for Gemma 3"):
            external.check(tiny("--engine", "vllm"))
    monkeypatch.setattr(external, "precision", lambda *_, **__: Choice("float32", "as asked for"))
    assert external.check(tiny("--engine", "vllm")) == sys.executable


@pytest.mark.usefixtures("vllm")
def test_an_adapter_is_merged_first(tiny: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kit.external.export", lambda config, folder: f"merged {config.method} into {folder.name}")
    assert external._merged(tiny("--method", "qdora"), tmp_path / "model") == str(tmp_path / "model")
    full = tiny("--method", "full")
    assert external._merged(full, tmp_path / "model") == str(full.run_dir / "model")
