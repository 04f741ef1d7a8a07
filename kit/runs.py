"""The run directory: config.json first, results last, nothing half-written in between."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kit import processes
from kit.config import EVALUATION_FIELDS, RunConfig
from kit.errors import UserError
from kit.files import read_json, write_json

SCHEMA = 1
RESULTS = ("checkpoints", "adapter", "model", "predictions.jsonl", "eval.json")
PACKAGES = ("unsloth", "unsloth_zoo", "trl", "transformers", "peft", "bitsandbytes", "torch", "xformers", "datasets", "sacrebleu", "rouge-score")


def open_run(config: RunConfig) -> Path:
    """The run's folder with its config.json; one made with other settings is a UserError that names them.

    A folder in which nothing was trained or generated yet (its command failed early) takes the new settings.
    """
    folder = config.run_dir
    path = folder / "config.json"
    if not processes.first():
        return folder
    for left in folder.rglob(".*.[0-9]*"):  # half-written by a process that was killed: nobody else is at work here
        if left.suffix[1:].isdigit():
            left.unlink(missing_ok=True)
    if not path.exists() or not any((folder / kept).exists() for kept in RESULTS):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema": SCHEMA, **config.identity()})
        return folder
    stored, wanted = load_config(folder, {}).identity(), config.identity()
    differing = sorted(k for k in stored.keys() | wanted.keys() if stored.get(k) != wanted.get(k))
    if differing and {*differing} <= {*EVALUATION_FIELDS} and not any((folder / kept).exists() for kept in ("predictions.jsonl", "eval.json")):
        write_json(path, {"schema": SCHEMA, **wanted})  # a run that is trained and not evaluated yet
        return folder
    if differing:
        changes = ", ".join(f"{k} {stored.get(k)!r} -> {wanted.get(k)!r}" for k in differing)
        raise UserError(f"{folder} was made with other settings ({changes}); choose another --name or --runs-dir, or remove the folder")
    return folder


def load_config(folder: Path, places: Mapping[str, str]) -> RunConfig:
    """The configuration that a run was made with; `places` gives the folders, which a run does not record."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no run: it has no config.json")
    stored = read_json(folder / "config.json")
    known = {f.name for f in dataclasses.fields(RunConfig)}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in known}
    return RunConfig(**values | dict(places))


def provenance(config: RunConfig, data_hash: str) -> dict[str, Any]:
    """Where a result comes from: code, versions, hardware, seed, data and model."""
    from kit.hub import BUILTIN, loaded_from, state

    repository, commit = loaded_from(config.model, config.revision)
    own = state(Path(repository)) if Path(repository).is_dir() and config.model not in BUILTIN else None  # the code's revision stands for what is shipped
    hub = {"model_repository": repository if commit else None, "model_revision": commit or own}
    return {
        "git": _git("rev-parse", "HEAD"), "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")), "versions": versions(), **machine(),
        "seed": config.seed, "data": data_hash, "model": config.model, **hub,
    }  # fmt: skip


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {p: version(p) for p in PACKAGES}


def machine() -> dict[str, str | None]:
    """GPU (or the reason why there is none), processor and driver."""
    from kit.device import cuda_gpu

    gpu, reason = cuda_gpu()
    return {"gpu": gpu.name if gpu else None, "gpu_absent_because": reason or None, "cpu": _cpu(), "driver": _driver()}


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or None)


def _driver() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def scored_by(record: Mapping[str, Any]) -> str:
    """The tokens that an eval.json was scored by; there was one kind once, and no word of it."""
    return str(record.get("score_tokens") or RunConfig.score_tokens)
