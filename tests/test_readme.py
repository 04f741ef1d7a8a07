"""What the READMEs say: every command is run whole, one after the other in one folder, on few rows; every example and link is true.

`make` is real and gives the Python commands; they run in this process, where Unsloth is imported once. What runs otherwise: `make test` starts one file of
tests, not itself; `make lint` is what every change passes before its tests; `make assets` takes 20 minutes, and what it does is tried in
tests/test_assets.py; benches with processes of their own run in tests/test_bench_train.py, and a command with a model of the hub in tests/test_hub.py,
where there is a hub; conda is not ours.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib
import importlib.util
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, config, in_process

from kit import metrics
from kit.bench import BENCHES
from kit.config import recipes
from kit.conversations import SHAPES
from kit.files import read_json
from kit.methods import METHODS, Method
from kit.report.rows import collect
from kit.runs import open_run
from kit.sources import SOURCES, Source

PAGES = [ROOT / "README.md", ROOT / "kit" / "README.md", ROOT / "kit" / "report" / "README.md"]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
# Of other programs, and for a shell: not ours to run.
FOREIGN = ("conda ", "source ")
# What every script is given besides, so that it is soon done; of a flag given twice the last counts.
DATA = ("--train-per-source", "60", "--valid-per-source", "4", "--test-per-source", "20")
SHORT = (*DATA, "--limit-train", "16", "--limit-test", "4", "--max-new-tokens", "4", "--forgetting-text", "none")
BENCH = ("--rounds", "1", "--limit-train", "8", "--limit-test", "4", "--name", "fresh", *DATA)
# Runs that other commands speak of; their own commands are tried like all others.
FIRST = ("make all METHOD=qlora", "make all METHOD=dora")
# make in a process of its own, with these words added.
WHOLE: dict[str, tuple[str, ...]] = {"make help": (), "make test": ("ARGS=tests/test_audit.py",)}
ELSEWHERE = (
    "make lint",
    "make assets",
    "make clean",
    "make bench",
    "python scripts/bench.py train",
    "python scripts/train.py --model HuggingFaceTB/SmolLM2-360M-Instruct --name smol",
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every command on the pages, in their order: lines of bash blocks, and code in the text that begins with make or python scripts/."""
    found = []
    for text in TEXT.values():
        lines = [re.sub(r"\s{2,}#.*", "", line).strip() for block in blocks(text, "bash") for line in block.splitlines()]
        assert [line for line in lines if not line.startswith(("make ", "python scripts/", *FOREIGN))] == []
        found += [line for line in lines if not line.startswith(FOREIGN)]
        found += re.findall(r"`((?:make|python scripts/)[^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return list(dict.fromkeys(c for c in found if c != "make"))


@contextlib.contextmanager
def checkout(folder: Path) -> Iterator[Path]:
    """A folder that looks like a fresh checkout, as the working directory."""
    folder.mkdir()
    for name in ("Makefile", "kit", "scripts", "requirements.lock", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    with contextlib.chdir(folder), mock.patch.dict(os.environ):
        os.environ.pop("CONDA_PREFIX", None)
        yield folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout with the user's own files, in which FIRST have been run."""
    with checkout(tmp_path_factory.mktemp("readme") / "project") as folder:
        shutil.copy(ROOT / "kit" / "assets" / "data" / SOURCES["ultrachat"].sample, folder / "my.jsonl")
        for command in FIRST:
            execute(command, folder)
        filled(folder)
        yield folder


def filled(folder: Path) -> None:
    """A rater's FILE.csv with every score given."""
    assert outcome(["scripts/rate.py", "--export", "FILE.csv", "--recipe", "tiny"]) == 0
    with open(folder / "FILE.csv", encoding="utf-8-sig", newline="") as file:
        head, *rows = csv.reader(file)
    with open(folder / "FILE.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *([cell or "3" for cell in row] for row in rows)])


def given_by_make(command: str, folder: Path) -> list[list[str]]:
    """The Python commands that the Makefile gives, without running them."""
    log, recorder = folder.parent / "log", folder.parent / "recorder"
    log.unlink(missing_ok=True)
    recorder.write_text(f"#!/bin/sh\nfor word; do printf '%s\\037' \"$word\"; done >> '{log}'\necho >> '{log}'\n")
    recorder.chmod(0o755)
    done = subprocess.run([*shlex.split(command), f"PYTHON={recorder}"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split("\037")[:-1] for line in log.read_text().splitlines()]


class Here:
    """In place of the process that scripts start for each of several seeds: the same command in this one."""

    begin = subprocess.Popen

    def __init__(self, command: list[str]) -> None:
        with mock.patch.object(subprocess, "Popen", self.begin):
            self.returncode = outcome(command[1:])


def outcome(words: list[str]) -> int:
    """The exit code of a script with its flags; whoever it asks says little and goes."""
    bench, what = Path(words[0]).stem == "bench", words[1:2]
    added = [*(BENCH if bench else SHORT), *(["--method", "lora"] if bench and what == ["train"] else [])]
    added += ["--scale-down"] if {"--recipe", "qlora-galore"} <= set(words) else []
    several = any("," in after for flag, after in itertools.pairwise(words) if flag == "--seeds")
    with mock.patch.object(sys, "stdin", io.StringIO("5\n4\n3\n")), mock.patch.object(subprocess, "Popen", Here) if several else contextlib.nullcontext():
        return in_process([*words, *added])


def execute(command: str, folder: Path) -> None:
    given = given_by_make(command, folder) if command.startswith("make ") else [shlex.split(command)[1:]]
    assert given, f"{command} does nothing"
    for words in given:
        assert outcome(words) == 0, shlex.join(words)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benches and sweeps of the same shape with less in them."""
    from kit import sweep
    from kit.bench import harness

    monkeypatch.setattr(sweep, "FACTORS", (1.0,))
    monkeypatch.setattr(sweep, "FEWEST", 1)
    monkeypatch.setattr(harness, "peak_alone", lambda *_: 0.5)  # a process for each variant: tests/test_bench.py
    for name in ("metrics", "report"):
        monkeypatch.setitem(BENCHES, name, functools.partial(BENCHES[name], rows=20))
    dora, report = (importlib.import_module(f"kit.bench.{name}") for name in ("dora", "report"))  # the attributes are the functions
    monkeypatch.setattr(report, "METHODS", ("lora",))
    monkeypatch.setattr(dora, "SHAPE", dora.SHAPE | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "query_pre_attn_scalar": 16})
    monkeypatch.setattr(dora, "ROWS", 2)
    monkeypatch.setattr(dora, "LENGTH", 16)
    monkeypatch.setattr(dora, "SETTINGS", {name: dora.SETTINGS[name] for name in ("train 16-bit x1", "generate float32")})


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("command", [c for c in commands() if c not in {*WHOLE, *ELSEWHERE}])
def test_every_command_does_its_work(command: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if "--tasks" in command and not importlib.util.find_spec("lm_eval"):
        assert outcome(shlex.split(command)[1:]) == 2
        assert "pip install" in capsys.readouterr().err
        return
    if "norobots" in command:  # the entry that the page adds
        monkeypatch.setitem(SOURCES, "norobots", entry("Source")[1])
    if command != "make report":  # it draws the figures of all that was made before
        monkeypatch.setattr("kit.report.write.draw", lambda *_: [])
    execute(command, project)
    if command.startswith("make compare ARGS"):  # all of them
        assert {r["method"]: r["status"] for r in collect(project / "runs" / "tiny")} == dict.fromkeys(["base", *METHODS], "done")


@pytest.mark.usefixtures("short")
def test_make_bench_runs_every_bench(project: Path) -> None:
    given = {words[1]: words for words in given_by_make("make bench", project)}
    assert {words[0] for words in given.values()} == {"scripts/bench.py"}
    assert given.keys() == BENCHES.keys()
    for name in BENCHES.keys() - {"train", "scaling", "dora"}:  # dora has a command of its own
        assert outcome(given[name]) == 0, name


@pytest.mark.parametrize("command", WHOLE)
def test_what_make_starts_itself(command: str) -> None:
    done = subprocess.run([*shlex.split(command), *WHOLE[command], f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert done.stdout


def cleaned(*words: str, typed: bytes | None = None) -> subprocess.CompletedProcess[str]:
    """`make clean`, by a person at a terminal where something is typed, else by a script."""
    command = ["make", "--no-print-directory", "clean", *words]  # which the make that runs these tests would have it say
    if typed is None:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    keys, terminal = os.openpty()
    try:
        os.write(keys, typed)
        return subprocess.run(command, stdin=terminal, capture_output=True, text=True, check=False)
    finally:
        os.close(keys)
        os.close(terminal)


@pytest.mark.parametrize("agreed", [{"words": ("ARGS=--yes",)}, {"typed": b"y\n"}])
def test_make_clean_asks_and_leaves_the_checkout(tmp_path: Path, agreed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with checkout(tmp_path / "project") as folder:
        ratings = open_run(config("--method", "dora")).parent / "ratings"
        ratings.mkdir()
        (folder / "report" / "example").mkdir(parents=True)
        (folder / "report" / "report.md").touch()
        for kept in (cleaned(), cleaned(typed=b"n\n"), cleaned("NAME=tiny"), cleaned("ARGS=--no")):
            assert ratings.exists()
            assert kept.returncode == (0 if "nothing was removed\n" in kept.stdout else 2)
        monkeypatch.setenv("ARGS", " ")  # as of a script whose variables are empty
        listed = cleaned()
        monkeypatch.delenv("ARGS")
        assert listed.stdout.splitlines() == ["these go:", "report/report.md", "runs/tiny", "runs/tiny/ratings"]
        assert "error: nothing was removed; to remove all of this unasked: make clean ARGS=--yes" in listed.stderr
        done = cleaned(*agreed.get("words", ()), typed=agreed.get("typed"))
        assert done.returncode == 0, done.stderr
        assert sorted(p.name for p in folder.iterdir()) == ["Makefile", "kit", "pyproject.toml", "report", "requirements.lock", "scripts"]
        assert [p.name for p in (folder / "report").iterdir()] == ["example"]
        assert (ROOT / "kit" / "assets").exists()
        assert cleaned().stdout == "there is nothing to remove\n"
        shutil.rmtree(folder / "report")
        (folder / "data" / "tiny").mkdir(parents=True)
        assert cleaned("ARGS=--yes").returncode == 0
        assert not (folder / "data").exists()


def test_make_assets_starts_what_makes_them(tmp_path: Path) -> None:
    with checkout(tmp_path / "project") as folder:
        assert given_by_make("make assets", folder) == [["-m", "kit.assets.make"]]


def test_a_wrong_command_is_found(project: Path) -> None:
    """This file's own checks can fail."""
    for wrong in ('make train ARGS="--rnak 4"', "python scripts/train.py --method lroa", "make all METHOD=qlroa", "python scripts/eval.py runs/tiny/none-s0"):
        with pytest.raises(AssertionError):
            execute(wrong, project)
    with pytest.raises(AssertionError, match="No rule to make target"):
        execute("make al", project)


def test_the_pages_hold_commands_and_know_what_there_is() -> None:
    assert len(commands()) > 30
    readme = TEXT[PAGES[0]]
    assert [m for m in METHODS if f"`{m}`" not in readme] == []
    assert [r for r in recipes() if f"`{r}`" not in readme] == []
    named = " ".join(commands())
    assert [p.stem for p in (ROOT / "scripts").glob("*.py") if f"make {p.stem}" not in named and f"scripts/{p.name}" not in named] == []


def speeds() -> list[tuple[str, str]]:
    """(ratios, file with the figures) of every row of the table of speed."""
    section = TEXT[PAGES[0]].partition("## Speed")[2].partition("\n## ")[0]
    return re.findall(r"^\|[^|]*\|[^|]*\| (\d[^|]*) \| \[\w+\]\(([^)]+)\)", section, re.MULTILINE)


@pytest.mark.parametrize(("said", "path"), speeds())
def test_the_speeds_are_those_that_were_measured(said: str, path: str) -> None:
    found = read_json(ROOT / path)
    assert found["command"].startswith("python scripts/bench.py")
    measured = {f"{ratio:.{digits}f}" for ratio in found["ratios"].values() for digits in (0, 1, 2)}
    assert set(re.findall(r"[\d.]+", said)) <= measured


def test_every_speed_is_checked() -> None:
    assert len(speeds()) == 9


def links() -> list[tuple[Path, str]]:
    return [(page, target) for page, text in TEXT.items() for target in re.findall(r"\]\(([^)#:]+)\)", text)]


@pytest.mark.parametrize(("page", "target"), links())
def test_links_lead_somewhere(page: Path, target: str) -> None:
    assert (page.parent / target).exists()


def test_the_map_of_the_code_names_every_module_of_the_kit() -> None:
    named = re.findall(r"`(\w+)(?:\.py)?`", TEXT[PAGES[1]].partition("## Adding")[0])
    known = {p.stem for p in (ROOT / "kit").glob("*.py")} - {"__init__"}
    assert known <= {*named}
    assert {*named} <= known | {p.stem for p in (ROOT / "kit" / "report").glob("*.py")}
    assert len(named) == len({*named} | {"config", "methods"})


def entry(kind: str) -> tuple[str, Any]:
    """The example entry of a registry on kit/README.md."""
    text = next(block for block in blocks(TEXT[PAGES[1]], "python") if f": {kind}(" in block)
    ((name, made),) = eval("{" + text + "}", {"Method": Method, "Source": Source, **vars(metrics)}).items()
    return name, made


@pytest.mark.parametrize("kind", ["Method", "Source", "Metric"])
def test_the_examples_of_entries_are_entries(kind: str) -> None:
    name, made = entry(kind)
    assert name not in METHODS
    if kind == "Source":
        assert made.shape in SHAPES
        assert (ROOT / "kit" / "assets" / "data" / made.sample).exists()
    if kind == "Metric":
        rows = [{"prediction": "one two three"}, {"prediction": "one"}]
        assert made.value(made.statistics(rows)) == 2.0
        assert isinstance(made.statistics(rows), np.ndarray)
    if kind == "Method":
        assert set(made.settings) <= set(vars(config()))
        assert name.isalpha()


def test_the_example_of_a_recipe_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = blocks(TEXT[PAGES[1]], "yaml")
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr("kit.config.RECIPES", tmp_path)
    from kit.settings import resolve as resolved

    made = resolved({"recipe": "mine", "method": "full"})
    assert (made.learning_rate, made.micro_batch, made.name) == (2e-5, 8, "mine")
