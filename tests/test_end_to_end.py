"""The real scripts with real Unsloth on the tiny model: data, base evaluation, training, evaluation, report; killed and gone on with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, places, script

from kit.files import read_json, read_jsonl, sha256

SMALL = ("--recipe", "tiny", "--valid-per-source", "8", "--limit-train", "160", "--limit-test", "96")
# Put on PYTHONPATH of every stage: any connection or name look-up is written down and refused; a process that imported Unsloth says so at its end.
WATCHED = """
import atexit, os, socket, sys
def note():
    if "unsloth" in sys.modules:
        with open({unsloth!r}, "a") as file:
            file.write(os.path.basename(sys.argv[0]) + "\\n")
atexit.register(note)
def refuse(*args, **kwargs):
    with open({log!r}, "a") as file:
        file.write(repr(args) + "\\n")
    raise OSError("the test allows no network")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
"""


def stage(name: str, folder: Path, *flags: str, env: dict[str, str] | None = None) -> str:
    done = script(name, *SMALL, *places(folder), *flags, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def watched(folder: Path) -> dict[str, str]:
    """The environment of a stage that is watched; what is seen lies in the folder's network.log and unsloth.log."""
    (folder / "sitecustomize.py").write_text(WATCHED.format(log=str(folder / "network.log"), unsloth=str(folder / "unsloth.log")))
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole comparison of base and qlora, with no network."""
    folder = tmp_path_factory.mktemp("experiment")
    env = watched(folder)
    # Training on its own builds the missing data first, and says so.
    assert f"building {folder}/data/tiny" in stage("train", folder, "--method", "qlora", env=env)
    stage("eval", folder, "--method", "base", env=env)
    stage("eval", folder, "--method", "qlora", env=env)
    stage("report", folder, env=env)
    return folder


def run(folder: Path, name: str = "qlora-s0") -> Path:
    return folder / "runs" / "tiny" / name


def test_nothing_asked_the_network(folder: Path) -> None:
    assert not (folder / "network.log").exists()


def test_unsloth_is_imported_by_training_and_evaluation_alone(folder: Path, tmp_path: Path) -> None:
    """It takes longer to import than the data stage and the report take to run."""
    assert (folder / "unsloth.log").read_text().splitlines() == ["train.py", "eval.py", "eval.py"]
    stage("data", tmp_path, "--train-per-source", "20", "--test-per-source", "5", "--valid-per-source", "0", env=watched(tmp_path))
    assert (tmp_path / "data" / "tiny" / "manifest.json").exists()
    assert not (tmp_path / "unsloth.log").exists()


def test_tuning_shows_a_real_gain(folder: Path) -> None:
    base, tuned = (read_json(run(folder, name) / "eval.json")["all"] for name in ("base", "qlora-s0"))
    assert [g for name in ("train", "eval") for g in read_json(run(folder) / f"{name}.json")["gates"].values() if not g["passed"]] == []
    for metric in ("bleu4", "rouge_l"):
        assert base[metric]["value"] > 0
        assert tuned[metric]["low"] > base[metric]["high"]
    assert tuned["perplexity"]["high"] < base["perplexity"]["low"]


def test_training_is_recorded(folder: Path) -> None:
    record = read_json(run(folder) / "train.json")
    assert record["status"] == "done"
    assert record["steps"] == 20
    assert set(record["phases"]) == {"load", "warmup", "steps", "save", "validation"}
    log = list(read_jsonl(run(folder) / "log.jsonl"))
    assert [r["step"] for r in log] == list(range(1, 21))
    assert sum(r["loss"] for r in log[-5:]) < 0.7 * sum(r["loss"] for r in log[:5])
    assert record["tokens_total"] > record["tokens_supervised"] > 0
    assert record["tokens_total"] == log[-1]["tokens"]
    assert record["trainable_params"] == 322_560
    assert record["provenance"]["data"] == sha256(folder / "data" / "tiny" / "manifest.json")
    assert not (run(folder) / "checkpoints").exists()


def test_a_4_bit_run_trains_its_adapter_in_float32(folder: Path) -> None:
    """TRL casts the adapter of a 4-bit model to bfloat16, which would compare precisions and not methods."""
    from safetensors import safe_open

    with safe_open(run(folder) / "adapter" / "adapter_model.safetensors", "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {"F32"}


def test_trained_tokens_are_those_of_the_data(folder: Path) -> None:
    from kit.hub import load_tokenizer
    from kit.prompts import Renderer

    rows = list(read_jsonl(folder / "data" / "tiny" / "train.jsonl"))[:160]
    examples = Renderer(load_tokenizer("builtin"), "chat", 256).examples(rows)
    record = read_json(run(folder) / "train.json")
    assert record["tokens_total"] == sum(len(e.input_ids) for e in examples)
    assert record["tokens_supervised"] == sum(e.supervised for e in examples)


def test_every_test_row_has_its_prediction(folder: Path) -> None:
    rows = list(read_jsonl(folder / "data" / "tiny" / "test.jsonl"))[:96]
    for name in ("base", "qlora-s0"):
        predictions = list(read_jsonl(run(folder, name) / "predictions.jsonl"))
        assert sorted(p["id"] for p in predictions) == sorted(r["id"] for r in rows)
        assert read_json(run(folder, name) / "eval.json")["all"]["bleu4"]["n"] == 96


def test_the_report_holds_both(folder: Path) -> None:
    summary = read_json(folder / "report" / "summary.json")
    assert [r["method"] for r in summary["rows"]] == ["base", "qlora"]
    [warning] = summary["warnings"]
    assert "% of the test rows resemble training rows: all scores and verdicts count them; Length and leaks has the scores without them, and " in warning
    assert {p.name for p in (folder / "report").iterdir()} == {"report.md", "report.html", "report.pdf", "comparison_table.csv", "summary.json", "figures"}


def test_a_second_call_does_nothing(folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.is_file()}
    started = time.perf_counter()
    assert "is trained already" in stage("train", folder, "--method", "qlora")
    assert "is evaluated already" in stage("eval", folder, str(run(folder)))
    print(f"two finished stages took {time.perf_counter() - started:.1f} s")
    assert {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.is_file()} == before


def test_other_settings_for_the_same_run_are_refused(folder: Path) -> None:
    done = script("train", *SMALL, *places(folder), "--rank", "4")
    assert done.returncode == 2
    assert "made with other settings (rank 16 -> 4)" in done.stderr


PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from peft import PeftModel
assert "unsloth" not in sys.modules
base, adapter, predictions, data = sys.argv[1:]
quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantised, device_map="cpu")
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(model, adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(adapter)
rows = {r["id"]: r for r in map(json.loads, open(data, encoding="utf-8"))}
wrong = []
for row in [json.loads(line) for line in open(predictions, encoding="utf-8")][::8]:
    messages = rows[row["id"]]["messages"][:-1]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=[1, 5], pad_token_id=0)
    reply = tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()
    if reply != row["prediction"]:
        wrong.append((reply, row["prediction"]))
print(json.dumps(wrong))
"""


def test_plain_transformers_and_peft_give_the_same_replies(folder: Path) -> None:
    arguments = [str(ROOT / "kit/assets/model"), str(run(folder) / "adapter"), str(run(folder) / "predictions.jsonl"), str(folder / "data/tiny/test.jsonl")]
    done = subprocess.run([sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []


def until(process: subprocess.Popen[bytes], state: Path) -> None:
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)


def test_a_stopped_and_then_killed_training_ends_where_an_undisturbed_one_does(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C, then SIGKILL, then the same command once more: the adapter is the undisturbed run's, bit for bit."""
    flags = [*SMALL, *places(tmp_path), "--data-dir", str(folder / "data"), "--method", "qlora", "--save-steps", "5"]
    command = [sys.executable, str(ROOT / "scripts/train.py"), *flags]
    checkpoints = run(tmp_path) / "checkpoints"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until(process, checkpoints / "checkpoint-5" / "trainer_state.json")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert re.search(r"stopped at step \d+, saved as checkpoint-\d+; the same command goes on there", said)
    assert read_json(run(tmp_path) / "train.json")["status"] == "cancelled"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(process, checkpoints / "checkpoint-10" / "trainer_state.json")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (checkpoints / "checkpoint-10").exists()
    done = script("train", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "going on from checkpoint-" in done.stdout
    resumed, whole = ([r["loss"] for r in read_jsonl(run(f) / "log.jsonl")] for f in (tmp_path, folder))
    assert resumed == whole
    assert sha256(run(tmp_path) / "adapter" / "adapter_model.safetensors") == sha256(run(folder) / "adapter" / "adapter_model.safetensors")
    for key in ("steps", "tokens_total", "tokens_supervised"):
        assert read_json(run(tmp_path) / "train.json")[key] == read_json(run(folder) / "train.json")[key]
