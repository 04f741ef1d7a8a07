"""The notebook for Colab: run from its first cell to its last on the tiny model, in a clone and a kernel of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hub_server import TOKEN

from kit.config import recipes
from kit.files import read_json
from kit.methods import METHODS

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: make setup")
import nbformat  # noqa: E402

NOTEBOOK = ROOT / "scripts" / "colab.ipynb"


def cell(title: str) -> str:
    """The source of the code cell with a title."""
    return next(str(c.source) for c in nbformat.read(NOTEBOOK, 4).cells if c.source.startswith(f"# @title {title}"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working tree as a repository to clone, whether or not this checkout is one."""
    folder = tmp_path_factory.mktemp("origin") / "project"
    folder.mkdir()
    for name in ("kit", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    who = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for command in (["init", "--quiet"], ["add", "-A"], [*who, "commit", "--quiet", "-m", "copy"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture
def colab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for google.colab whose secrets hold a token; returns where downloads are written down (mounts in the working directory)."""
    stand_in = tmp_path / "stand-in" / "google" / "colab"
    stand_in.mkdir(parents=True)
    (stand_in / "userdata.py").write_text(f"def get(name):\n    return {{'HF_TOKEN': {TOKEN!r}}}[name]\n")
    downloads = tmp_path / "downloads.txt"
    (stand_in / "drive.py").write_text("import pathlib\ndef mount(path):\n    pathlib.Path('mounted.txt').write_text(path)\n")
    (stand_in / "files.py").write_text(f"def download(path):\n    open({str(downloads)!r}, 'w').write(path)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "stand-in"), str(ROOT)]))
    return downloads


def test_it_runs_from_the_first_cell_to_the_last(repository: Path, colab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    form = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    form.source = f"METHOD, RECIPE, LIMIT, DRIVE, REPOSITORY = 'lora', 'tiny', 16, '/my folder', {str(repository)!r}"
    for each in notebook.cells:
        each.source = each.source.replace("/content/drive", str(tmp_path / "mounted"))
    drive = tmp_path / "mounted" / "MyDrive" / "my folder"
    monkeypatch.setenv("PYTHON", sys.executable)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = json.dumps([c.get("outputs", []) for c in notebook.cells])
    assert TOKEN not in outputs
    assert "HF_TOKEN comes from Colab's secrets" in outputs
    checkout = tmp_path / "kit-checkout"
    assert (checkout / "mounted.txt").read_text() == str(tmp_path / "mounted")
    assert sorted(p.name for p in drive.iterdir()) == ["data", "report", "runs"]
    assert not (checkout / "runs").exists()
    rows = read_json(drive / "report" / "summary.json")["rows"]
    assert [(r["method"], r["status"]) for r in rows] == [("base", "done"), ("lora", "done")]
    assert outputs.count('"image/png"') == len(list((drive / "report" / "figures").glob("*.png"))) > 2
    table = next(o for c in notebook.cells for o in c.get("outputs", []) if "text/html" in o.get("data", {}))["data"]["text/html"]
    assert "perplexity_low" in table
    assert "NaN" not in table
    assert colab.read_text() == str(checkout / "report.zip")
    assert (checkout / "report.zip").exists()
    leaked = [p for p in checkout.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert leaked == []


def test_a_command_that_fails_stops_it(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    form = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    form.source = f"METHOD, RECIPE, LIMIT, DRIVE, REPOSITORY = 'qlroa', 'tiny', 16, '', {str(repository)!r}"
    monkeypatch.setenv("PYTHON", sys.executable)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="the lines above say what to do"):
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "did you mean 'qlora'?" in json.dumps([c.get("outputs", []) for c in notebook.cells])
    assert not (tmp_path / "kit-checkout" / "runs").exists()


def test_it_is_stored_without_outputs_and_offers_what_there_is() -> None:
    cells = [c for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code"]
    assert len(cells) == 9
    assert [c for c in cells if c.outputs or c.execution_count] == []
    offered = [json.loads(found) for found in re.findall(r"@param (\[.*\])", cell("What to run"))]
    assert set(offered[0]) == set(METHODS) - {"combined"}  # make runs it with hybrid
    assert set(offered[1]) == {"auto", *recipes()}


def test_without_colab_it_goes_on_without_a_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    exec(cell("Hugging Face token"), {"os": os})
    assert capsys.readouterr().out.startswith("no token from Colab's secrets (ModuleNotFoundError)")
    assert "HF_TOKEN" not in os.environ


@pytest.mark.parametrize(
    ("torch", "works", "expected"),
    [
        ("locked", True, ["-m venv --system-site-packages", "grep -vE", "uv pip install", "touch .venv/.ready"]),
        ("locked", False, ["-m venv --system-site-packages", "grep -vE", "uv pip install", "apt-get", "make setup"]),
        ("2.99.0", True, ["apt-get", "make setup"]),
        (None, True, ["apt-get", "make setup"]),
    ],
)
def test_colabs_torch_is_used_only_where_it_is_the_locked_one(
    torch: str | None, works: bool, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The set-up cell with its commands written down instead of run."""
    import importlib.metadata

    from IPython.core.inputtransformer2 import TransformerManager

    lock = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))

    def version(name: str) -> str:
        if name == "torch" and torch is None:
            raise importlib.metadata.PackageNotFoundError
        return f"{torch}+cu128" if name == "torch" and torch != "locked" else f"{lock[name]}+cu128"

    ran: list[str] = []

    class Shell:
        def system(self, command: str) -> None:
            ran.append(command)
            space["_exit_code"] = 0 if works or "make setup" in command else 1

    shutil.copy(ROOT / "requirements.lock", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", version)
    space: dict[str, Any] = {"os": os, "get_ipython": Shell, "_exit_code": 0}
    exec(TransformerManager().transform_cell(cell("Set up")), space)
    assert len(ran) == len(expected)
    assert all(part in command for part, command in zip(expected, ran, strict=True)), ran


def test_the_rest_of_the_lock_leaves_colabs_torch_alone() -> None:
    pattern = re.search(r"grep -vE '(.*)' requirements.lock", cell("Set up"))
    assert pattern
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    left = [line.partition("==")[0] for line in lines if re.search(pattern[1], line)]
    assert {"torch", "torchvision", "triton"} < set(left)
    assert all(name in ("torch", "torchvision", "triton") or re.fullmatch(r"nvidia-.*-cu\d+", name) for name in left)  # nvidia-ml-py is the kit's own need
