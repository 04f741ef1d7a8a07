"""Checkpoints of a training: the newest one that is whole. Damaged ones are named and passed over."""

from __future__ import annotations

import shutil
from pathlib import Path

from kit.console import say


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end (the trainer writes trainer_state.json last) and can be read; damaged ones are named."""
    complete = sorted((p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").exists()), key=step_of, reverse=True)
    for checkpoint in complete:
        if (damage := damaged(checkpoint)) is None:
            return checkpoint
        say(f"{checkpoint} is damaged ({damage}); trying the one before it")
        shutil.rmtree(checkpoint)
    return None


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def damaged(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    import json
    import zipfile

    import torch
    from safetensors import safe_open

    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix == ".safetensors":
                safe_open(path, "pt")
            elif path.name.startswith("rng_state"):  # with numpy's state, which weights_only refuses: whole or not is all that is asked
                zipfile.ZipFile(path).close()
            elif path.suffix in (".pt", ".pth"):
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except Exception as error:
            return f"{path.name}: {type(error).__name__}"
    return None
