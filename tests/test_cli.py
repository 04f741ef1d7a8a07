"""The command line: errors in one line with exit code 2, and no heavy import before they are out."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT, script

HEAVY = ("torch", "transformers", "unsloth", "trl", "peft", "datasets", "matplotlib", "numpy")


@pytest.mark.parametrize("name", ["data", "train", "eval", "report"])
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


def test_make_knows_every_method_and_passes_errors_on() -> None:
    from kit.methods import METHODS

    shown = subprocess.run(["make", "help", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"one of: {' '.join(METHODS)}" in shown
    done = subprocess.run(["make", "all", "METHOD=qlroa", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown method 'qlroa'; did you mean 'qlora'?" in done.stderr
