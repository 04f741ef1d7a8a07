"""Shared fixtures: the built-in tokenizer, a GPT-2-like one, the scripts as a user runs them, and a small tiny-recipe configuration."""

from __future__ import annotations

import hashlib
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import pytest

from kit.cli import parser
from kit.config import DATA_FIELDS, RunConfig
from kit.settings import resolve

ROOT = Path(__file__).parent.parent
# The suite tests the CPU path on every machine; tests marked gpu turn this off again.
os.environ["UNSLOTH_FORCE_CPU"] = "1"
# Two test processes run side by side; more threads than cores would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What `make test ARGS=...` was given is not for the makes that tests start.
for name in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "ARGS"):
    os.environ.pop(name, None)


# The files that take longest come first, so that the test processes end at about the same time.
LONGEST = (
    "end_to_end", "training", "gpu_path", "notebook", "model", "evaluation", "bench_train", "bench_dora", "hybrid", "statistics", "hub", "readme", "render",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def tokenizer():
    """Gemma-like: adds bos, has a chat template."""
    from kit.hub import load_tokenizer

    return load_tokenizer("builtin")


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    """GPT-2-like: bos = eos, adds none, no pad token, no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["### Instruction:\nDo it.\n\n### Response:\nDone."],
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def config(*flags: str) -> RunConfig:
    """The configuration that a command line means, with the tiny recipe."""
    return resolve(parser("").parse(["--recipe", "tiny", *flags]))


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., RunConfig]:
    """A tiny configuration whose folders lie in the test's own folder."""

    def make(*flags: str) -> RunConfig:
        return config("--data-dir", str(tmp_path / "data"), "--runs-dir", str(tmp_path / "runs"), "--report-dir", str(tmp_path / "report"), *flags)

    return make


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For data that many tests read and none changes."""
    return tmp_path_factory.mktemp("built")


@pytest.fixture
def ready(tiny: Callable[..., RunConfig], built: Path) -> Callable[..., RunConfig]:
    """As `tiny`, with data that are built once for all tests that ask for the same."""

    def make(*flags: str) -> RunConfig:
        wanted = tiny(*flags)
        key = hashlib.sha256(repr([getattr(wanted, f) for f in DATA_FIELDS]).encode()).hexdigest()[:16]
        return tiny(*flags, "--data-dir", str(built / key))

    return make


def script(name: str, *flags: str, cwd: Path = ROOT, env: dict[str, str] | None = None, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """A script run as a user runs it, in a process of its own."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *flags]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout, check=False)


def in_process(words: Sequence[str | Path]) -> int:
    """The exit code of a script run to its end in this process, where Unsloth is imported once; `words` as after `python`."""
    with mock.patch.dict(os.environ), mock.patch.object(sys, "argv", list(map(str, words))):
        try:
            runpy.run_path(str(words[0]), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def places(folder: Path) -> tuple[str, ...]:
    return "--data-dir", str(folder / "data"), "--runs-dir", str(folder / "runs"), "--report-dir", str(folder / "report")
