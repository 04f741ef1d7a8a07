"""The command line: errors in one line with exit code 2, and no heavy import before they are out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, script

from kit.cli import configure, trained_run
from kit.config import GROUPS, fields
from kit.errors import UserError
from kit.runs import open_run
from kit.settings import resolve

HEAVY = ("torch", "transformers", "unsloth", "trl", "peft", "datasets", "matplotlib", "numpy")


@pytest.mark.parametrize("name", ["data", "train", "eval", "report", "sweep", "rate", "bench", "chat", "export", "doctor"])
def test_help_lists_the_flags_by_groups(name: str) -> None:
    done = script(name, "--help")
    assert done.returncode == 0
    groups = dict(re.findall(r"^(\w+):\n(.*?)(?=^\S|\Z)", done.stdout, re.DOTALL | re.MULTILINE))
    assert [g for g in groups if g in GROUPS.values()] == list(GROUPS.values())
    listed = {f: {g for g, text in groups.items() if f"  --{f.replace('_', '-')} " in text or f"  --{f.replace('_', '-')}," in text} for f in fields()}
    assert all(len(found) == 1 and found <= set(GROUPS.values()) for found in listed.values()), listed
    assert (listed["learning_rate"], listed["rank"]) == ({"training"}, {"method"})


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
            "a sweep is judged on validation rows: give --valid-per-source, with a new --name if there are data and runs of this one",
        ),
        ("export", ["--recipe", "tiny", "--method", "base", "--out", "x"], "base is the untuned model, builtin: it has nothing to export"),
        ("train", ["--method", "base"], "base is the untuned model: it is evaluated, not trained"),
        ("data", ["--recipe", "tiny", "--data-dir", "Makefile"], "Makefile: File exists; what was there before is unchanged"),
        ("data", ["--show", "-1"], "--show takes a number of rows, got -1"),
        ("data", ["--source", "alpca"], "unknown source 'alpca'; did you mean 'alpaca'?"),
        (
            "data",
            ["--source", "mine/my.csv"],
            "'mine/my.csv' cannot name a folder or source: use letters, digits, '-', '_' and '.'; a source of your own is NAME=FILE or NAME=OWNER/DATASET",
        ),
        ("data", ["--source", "alpaca=missing.json"], "source alpaca: no such file: missing.json"),
        ("eval", ["runs/tiny/nothing-s0"], "runs/tiny/nothing-s0 is no trained run: it has no config.json; train one with scripts/train.py"),
        ("report", ["--runs-dir", "nowhere"], "no runs in nowhere/tiny; make some with: make all METHOD=qlora NAME=tiny"),
    ],
)
def test_user_errors_are_one_line(name: str, flags: list[str], message: str) -> None:
    done = script(name, *flags)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_what_the_model_cannot_take_is_refused_before_its_data_are_built(tmp_path: Path) -> None:
    done = script("data", "--recipe", "tiny", "--method", "lora", "--target-modules", "q_prj", "--data-dir", str(tmp_path / "data"))
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "error: unknown target module 'q_prj'; did you mean 'q_proj'?")
    assert not (tmp_path / "data").exists()


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


@pytest.mark.parametrize(("ended", "code"), [(7, 7), (-15, 143)])
def test_seeds_run_one_process_each_and_stop_at_the_first_failure(monkeypatch: pytest.MonkeyPatch, ended: int, code: int) -> None:
    calls: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str]) -> None:
            calls.append(command[1:])
            self.returncode = None

        def wait(self) -> None:
            self.returncode = 0 if len(calls) < 2 else ended

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(sys, "argv", ["train.py", "--method", "lora", "--seeds", "0,1,2", "--rank", "4"])
    with pytest.raises(SystemExit) as stop:
        configure("")
    assert stop.value.code == code
    assert calls == [["train.py", "--method", "lora", "--rank", "4", "--seed", seed] for seed in "01"]


def test_one_seed_needs_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kit.cli.announced", resolve)  # the real one sets environment variables that other tests' processes would inherit
    assert configure("", ["--recipe", "tiny", "--seeds", "3"]).seed == 3
    assert configure("", ["--recipe", "tiny", "--seed", "5", "--seeds", "0"]).seed == 5  # ARGS="--seed 5" beside what make gives
    with pytest.raises(UserError, match="give --seed or --seeds, not both"):
        configure("", ["--recipe", "tiny", "--seed", "5", "--seeds", "0,1"])
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun's processes meet once, for one training
    assert configure("", ["--recipe", "tiny", "--seeds", "3"]).seed == 3
    with pytest.raises(UserError, match="several processes take one --seed"):
        configure("", ["--recipe", "tiny", "--seeds", "0,1"])


def test_a_copied_or_renamed_run_is_not_taken_for_the_one_that_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kit.cli.announced", resolve)
    config = resolve({"recipe": "tiny", "method": "lora", "runs_dir": str(tmp_path)})
    folder = open_run(config)
    monkeypatch.chdir(folder.parent)
    assert trained_run({"run": "lora-s0"}).run_dir.resolve() == folder
    folder.rename(folder.with_name("backup"))
    with pytest.raises(UserError, match="backup was renamed or copied: it holds the run tiny/lora-s0"):
        trained_run({"run": str(tmp_path / "tiny" / "backup")})


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (("all", "METHODS=lora dora"), 'here give one METHOD, or: make compare METHODS="lora dora"'),
        (("compare", "METHOD=lora"), 'here give METHODS="lora"'),
        (("compare", "METHODS=lora lroa"), "unknown method lroa; known: qlora"),
        (("compare", "METHODS="), "METHODS names no method"),
        (("sweep", "METHODS=hybrid"), "are not swept; sweep their parts"),
        (("compare", "METHODS=lora", "NAME=never-swept", "ARGS=--recipe tiny --tuned"), "--tuned needs runs/never-swept/sweep/lora.json"),
    ],
)
def test_make_refuses_before_hours_are_spent(goal: tuple[str, ...], message: str) -> None:
    done = subprocess.run(["make", *goal, f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_make_takes_the_seed_to_chat_and_export() -> None:
    for goal in (("chat",), ("export", "OUT=x")):
        shown = subprocess.run(["make", "-n", *goal, "SEEDS=3 4", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "--seed '3'" in shown


def test_a_closed_pipe_ends_nothing() -> None:
    """What comes after it is still done, quietly."""
    code = "from kit.console import say\nfor i in range(20000): say('x' * 50)\nimport sys; print('went on', file=sys.stderr)"
    done = subprocess.run(f'{sys.executable} -c "{code}" | head -1', shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == ["went on"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--learning-rate", "nan"],
        ["--epochs", "inf"],
        ["--seed", "-1"],
        ["--weight-decay", "-1"],
        ["--data-seed", str(2**32)],
        ["--limit-train", str(10**30)],
        ["--rank=--"],
        ["--runs-dir", os.fsdecode(b"\xff")],
    ],
)
def test_numbers_that_cannot_be_are_refused(flags: list[str]) -> None:
    with pytest.raises(UserError, match="--rank: expected one" if "=" in flags[0] else f"{flags[0]} must"):
        configure("", ["--recipe", "tiny", *flags])


def test_another_locale_changes_no_file() -> None:
    code = "from kit.cli import run; from pathlib import Path\nrun(lambda: print(Path('README.md').open().encoding))"
    other = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=other, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("utf-8\n", "")


def test_a_terminal_without_a_width_and_a_closed_input() -> None:
    code = "from kit.console import say; import sys; say(f'here {sys.stdin.isatty()}')"
    done = subprocess.run(f'COLUMNS=0 {sys.executable} -c "{code}" <&-', shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("here False\n", "")
    code = "import kit.console; import os, sys; os.write(3, str(sys.stderr.name).encode())"
    done = subprocess.run(f'{sys.executable} -c "{code}" 3>&1 >&- 2>&-', shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == os.devnull


def test_a_second_ctrl_c_while_it_ends_is_quiet() -> None:
    farewell = "import atexit, os, signal; from kit.cli import run\natexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"
    code = f"{farewell}\ndef main(): raise KeyboardInterrupt\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "stopped; the same command goes on where it stopped\n")


def test_make_knows_every_method_and_passes_errors_on() -> None:
    from kit.methods import METHODS

    shown = subprocess.run(["make", "help", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"one of: {' '.join(METHODS)}" in shown
    done = subprocess.run(["make", "all", "METHOD=qlroa", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown method 'qlroa'; did you mean 'qlora'?" in done.stderr


@pytest.mark.parametrize(("code", "after"), [(2, ["eval lora", "train dora", "eval dora", "report"]), (130, [])])
def test_make_compare_goes_on_after_a_method_that_fails_and_stops_when_it_is_told_to(code: int, after: list[str], tmp_path: Path) -> None:
    """What does not fit on this GPU, or diverges, costs the others nothing, and there is a report."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f'#!/bin/sh\nscript=$(basename $1 .py); for word; do test "$before" = --method && method=$word; before=$word; done\n'
        f"echo $script $method >> '{tmp_path}/log'\ntest \"$script $method\" = 'train qlora' && exit {code}; exit 0\n"
    )
    stand_in.chmod(0o755)
    done = subprocess.run(["make", "compare", "METHODS=qlora lora dora", f"PYTHON={stand_in}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2  # make's own
    given = [line.strip() for line in (tmp_path / "log").read_text().splitlines()]
    assert given == ["data base", "eval base", "train qlora", *(["train lora", *after] if after else [])]
    assert ("error: not finished, for the reasons above: qlora" in done.stderr) == bool(after)


@pytest.mark.parametrize("given", ["SOURCE=a.json", "method=dora", "METOD=dora", "LIMIT=64"])
def test_make_refuses_a_variable_that_it_would_ignore(given: str) -> None:
    done = subprocess.run(["make", "all", given, f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"unknown variable {given.partition('=')[0]}; known: METHOD METHODS" in done.stderr
    assert subprocess.run(["make", "help", "HF_TOKEN=x", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(("wsl", "named"), [("", True), ("Ubuntu", False)])
def test_the_name_of_a_computer_names_no_experiment(wsl: str, named: bool) -> None:
    env = {k: v for k, v in os.environ.items() if k != "WSL_DISTRO_NAME"} | {"NAME": "DESKTOP-1"} | ({"WSL_DISTRO_NAME": wsl} if wsl else {})
    for given, expected in (([], named), (["NAME=mine"], True)):
        command = ["make", "-n", "data", *given, f"PYTHON={sys.executable}"]
        shown = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
        assert ("--name" in shown) == expected


def test_combined_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"instruction": "i", "output": "o"}\n')
    places = [f"{name}={tmp_path / name.lower()}" for name in ("DATA_DIR", "RUNS_DIR", "REPORT_DIR")]
    command = ["make", "compare", "METHODS=lora combined", f"SOURCES=mine={tmp_path / 'mine.jsonl'}", "NAME=mine", "RECIPE=tiny", *places]
    done = subprocess.run([*command, f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "combined chooses its weights on validation rows: give --valid-per-source" in done.stderr
    assert not (tmp_path / "data_dir").exists()


def test_what_uv_is_told_beside_the_lock_is_what_the_lock_says() -> None:
    """uv puts an override of pyproject.toml above the versions of the file that it installs."""
    import tomllib

    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]["override-dependencies"]
    locked = [line.partition(" ;")[0] for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()]
    assert [line for line in told if line not in locked] == []
