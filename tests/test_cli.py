"""The command line: errors in one line with exit code 2, and no heavy import before they are out."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT, script

from kit.cli import configure

HEAVY = ("torch", "transformers", "unsloth", "trl", "peft", "datasets", "matplotlib", "numpy")


@pytest.mark.parametrize("name", ["data", "train", "eval", "report", "sweep", "rate", "bench", "chat", "export", "doctor"])
def test_help_lists_the_flags(name: str) -> None:
    done = script(name, "--help")
    assert done.returncode == 0
    assert "--learning-rate" in done.stdout


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("train", ["--method", "qlroa"], "unknown method 'qlroa'; did you mean 'qlora'?"),
        ("train", ["--recipe", "tny"], "unknown recipe 'tny'; did you mean 'tiny'?"),
        ("train", ["--methd", "lora"], "unknown flag '--methd'; did you mean '--method'?"),
        ("train", ["--rank", "many"], "argument --rank: invalid int value: 'many'"),
        ("train", ["--seeds", "0,x"], "--seeds takes whole numbers with commas between them, such as 0,1,2; got '0,x'"),
        ("train", ["--report-to", "wandbb"], "unknown report_to 'wandbb'; did you mean 'wandb'?"),
        ("sweep", ["--share", "2"], "--share must be above 0 and at most 1, got 2.0"),
        (
            "sweep",
            ["--recipe", "tiny", "--valid", "0"],
            "a sweep is judged on validation rows: give --valid-per-source (and rebuild the data with scripts/data.py --overwrite)",
        ),
        ("train", ["--method", "base"], "base is the untuned model: it is evaluated, not trained"),
        ("data", ["--source", "alpca"], "unknown source 'alpca'; did you mean 'alpaca'?"),
        ("data", ["--source", "alpaca=missing.json"], "source alpaca: no such file: missing.json"),
        ("eval", ["runs/tiny/nothing-s0"], "runs/tiny/nothing-s0 is no trained run: it has no config.json; train one with scripts/train.py"),
        ("report", ["--runs-dir", "nowhere"], "no runs in nowhere/tiny; make some with: make all METHOD=qlora"),
    ],
)
def test_user_errors_are_one_line(name: str, flags: list[str], message: str) -> None:
    done = script(name, *flags)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_parsing_and_its_errors_import_nothing_heavy() -> None:
    code = f"""
import runpy, sys
sys.argv = ["scripts/train.py", "--method", "qlroa"]
try:
    runpy.run_path("scripts/train.py", run_name="__main__")
except SystemExit as stop:
    assert stop.code == 2
print([m for m in {HEAVY} if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_report_needs_no_torch() -> None:
    code = "import kit.report.write, kit.report.tables, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_seeds_run_one_process_each_and_stop_at_the_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str]) -> None:
            calls.append(command[1:])
            self.returncode = None

        def wait(self) -> None:
            self.returncode = 0 if len(calls) < 2 else 7

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(sys, "argv", ["train.py", "--method", "lora", "--seeds", "0,1,2", "--rank", "4"])
    with pytest.raises(SystemExit) as stop:
        configure("")
    assert stop.value.code == 7
    assert calls == [["train.py", "--method", "lora", "--rank", "4", "--seed", seed] for seed in "01"]


def test_one_seed_needs_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kit.cli.announce", lambda *_: None)  # it sets environment variables that other tests' processes would inherit
    assert configure("", ["--recipe", "tiny", "--seeds", "3"]).seed == 3


def test_make_knows_every_method_and_passes_errors_on() -> None:
    from kit.methods import METHODS

    shown = subprocess.run(["make", "help", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"one of: {' '.join(METHODS)}" in shown
    done = subprocess.run(["make", "all", "METHOD=qlroa", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown method 'qlroa'; did you mean 'qlora'?" in done.stderr
