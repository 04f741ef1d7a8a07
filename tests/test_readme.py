"""What the READMEs say: every command is run, whole or up to the point where the script has its configuration; every example and link is true.

RUN names those that are run whole here; tests/test_notebook.py runs `make doctor` and `make all` whole. All others go through the real Makefile,
with the Python commands that it gives written down, and through the real scripts, until they have parsed, checked and resolved their flags: what
remains is the work that other tests do.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, config

from kit import metrics
from kit.config import recipes
from kit.methods import METHODS, Method
from kit.runs import open_run
from kit.sources import SHAPES, Source

PAGES = [ROOT / "README.md", ROOT / "kit" / "README.md", ROOT / "kit" / "report" / "README.md"]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
RUN = ['make data ARGS="--inspect --show 3"', "make help", "make clean", "python scripts/train.py --help"]
# Of other programs, and for a shell: not ours to run.
FOREIGN = ("conda ", "source ")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every command on the pages: lines of bash blocks, and code in the text that begins with make or python scripts/."""
    found = []
    for text in TEXT.values():
        lines = [re.sub(r"\s{2,}#.*", "", line).strip() for block in blocks(text, "bash") for line in block.splitlines()]
        assert [line for line in lines if not line.startswith(("make ", "python scripts/", *FOREIGN))] == []
        found += [line for line in lines if not line.startswith(FOREIGN)]
        found += re.findall(r"`((?:make|python scripts/)[^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return sorted({c for c in found if c != "make"})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a checkout, in which dora and qlora were begun."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("Makefile", "kit", "scripts", "requirements.lock", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    for method in ("dora", "qlora"):
        open_run(config("--method", method))
    return folder


def given_by_make(command: str, folder: Path) -> list[list[str]]:
    """The Python commands that the Makefile gives, without running them."""
    log, recorder = folder.parent / "log", folder.parent / "recorder"
    recorder.write_text(f"#!/bin/sh\nfor word; do printf '%s\\037' \"$word\"; done >> '{log}'\necho >> '{log}'\n")
    recorder.chmod(0o755)
    done = subprocess.run([*shlex.split(command), f"PYTHON={recorder}"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split("\037")[:-1] for line in log.read_text().splitlines()]


class Resolved(Exception):
    """A script has its configuration."""


def resolve(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a script until it has its configuration; for several seeds, each seed's command too."""

    def stop(*_: object) -> None:
        raise Resolved

    class Process:
        returncode = 0

        def __init__(self, child: list[str]) -> None:
            resolve(child[1:], monkeypatch)

    with monkeypatch.context() as patch:
        patch.setattr("kit.cli.announce", stop)
        patch.setattr("kit.cli.run", lambda main: main())
        patch.setattr(subprocess, "Popen", Process)
        patch.setattr(sys, "argv", command)
        try:
            runpy.run_path(command[0], run_name="__main__")
        except Resolved:
            return
        except SystemExit as end:
            if end.code in (0, None):
                return
    pytest.fail(f"{shlex.join(command)} ended without a configuration")


def check(command: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = given_by_make(command, project) if command.startswith("make ") else [shlex.split(command)[1:]]
    assert given, f"{command} does nothing"
    for words in given:
        if words[0] == "-m":
            assert importlib.util.find_spec(words[1])
        else:
            resolve(words, monkeypatch)


@pytest.mark.parametrize("command", [c for c in commands() if c not in RUN])
def test_every_command_reaches_its_configuration(command: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(command, project, monkeypatch)


@pytest.mark.parametrize("command", RUN)
def test_what_is_cheap_is_run_whole(command: str, project: Path) -> None:
    assert command in commands()
    words = shlex.split(command)
    words = [*words, f"PYTHON={sys.executable}"] if words[0] == "make" else [sys.executable, *words[1:]]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=project, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    if command == "make clean":
        assert not (project / "runs").exists()
        assert (ROOT / "kit").exists()
    else:
        assert done.stdout


def test_a_wrong_command_is_found(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This file's own checks can fail."""
    from kit.errors import UserError

    for wrong in ('make train ARGS="--rnak 4"', "python scripts/train.py --method lroa", "make all METHOD=qlroa", "python scripts/eval.py runs/tiny/none-s0"):
        with pytest.raises((UserError, AssertionError)):
            check(wrong, project, monkeypatch)
    with pytest.raises(AssertionError, match="No rule to make target"):
        check("make al", project, monkeypatch)


def test_the_pages_hold_commands_and_know_what_there_is() -> None:
    assert len(commands()) > 30
    readme = TEXT[PAGES[0]]
    assert [m for m in METHODS if f"`{m}`" not in readme] == []
    assert [r for r in recipes() if f"`{r}`" not in readme] == []
    named = " ".join(commands())
    assert [p.stem for p in (ROOT / "scripts").glob("*.py") if f"make {p.stem}" not in named and f"scripts/{p.name}" not in named] == []


def links() -> list[tuple[Path, str]]:
    return [(page, target) for page, text in TEXT.items() for target in re.findall(r"\]\(([^)#:]+)\)", text)]


@pytest.mark.parametrize(("page", "target"), links())
def test_links_lead_somewhere(page: Path, target: str) -> None:
    assert (page.parent / target).exists()


@pytest.mark.parametrize("kind", ["Method", "Source", "Metric"])
def test_the_examples_of_entries_are_entries(kind: str) -> None:
    text = next(block for block in blocks(TEXT[PAGES[1]], "python") if f": {kind}(" in block)
    ((name, entry),) = eval("{" + text + "}", {"Method": Method, "Source": Source, **vars(metrics)}).items()
    assert name not in METHODS
    if kind == "Source":
        assert entry.shape in SHAPES
        assert (ROOT / "kit" / "assets" / "data" / entry.sample).exists()
    if kind == "Metric":
        rows = [{"prediction": "one two three"}, {"prediction": "one"}]
        assert entry.value(entry.statistics(rows)) == 2.0
        assert isinstance(entry.statistics(rows), np.ndarray)
    if kind == "Method":
        assert set(entry.settings) <= set(vars(config()))
        assert name.isalpha()


def test_the_example_of_a_recipe_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = blocks(TEXT[PAGES[1]], "yaml")
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr("kit.config.RECIPES", tmp_path)
    from kit.config import resolve as resolved

    made = resolved({"recipe": "mine", "method": "full"})
    assert (made.learning_rate, made.micro_batch, made.name) == (2e-5, 8, "mine")
