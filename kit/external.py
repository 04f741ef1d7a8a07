"""--engine vllm: replies by vLLM in a Python of its own (VLLM_PYTHON, by default this one), from a merged model in 16 bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit.config import BASE, RunConfig
from kit.console import say
from kit.errors import UserError
from kit.export import export
from kit.files import read_json
from kit.generation import Reply, ends, until_stop
from kit.hub import load_tokenizer, loadable
from kit.model import architecture, precision, saved_folder
from kit.prompts import Renderer

WORKER = Path(__file__).parent / "vllm_worker.py"


def check(config: RunConfig) -> str:
    """The Python that has vLLM. None, or a model that vLLM refuses in this machine's precision, is a UserError."""
    python = os.environ.get("VLLM_PYTHON", sys.executable)
    try:
        found = subprocess.run([python, "-P", "-c", "import vllm"], capture_output=True, text=True, check=False)
        reason = (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1] if found.returncode else ""
    except OSError as error:
        reason = str(error)
    if reason:
        raise UserError(f"--engine vllm: {python} cannot import vllm ({reason}); install it into an environment of its own and set VLLM_PYTHON to its python")
    chosen = precision(config, training=False)
    if chosen.name == "float16" and architecture(config).model_type.startswith("gemma3"):
        raise UserError("--engine vllm: vLLM refuses float16 for Gemma 3; use --precision float32 (or bfloat16, where the GPU has it), or the kit's engine")
    return python


def replies(config: RunConfig, rows: Sequence[dict[str, object]]) -> dict[str, Reply]:
    """Greedy replies by test row id. A 4-bit method's adapter is merged into the 16-bit base, so its replies are not those of the 4-bit model."""
    python = check(config)
    tokenizer = load_tokenizer(config.model, config.revision)
    renderer = Renderer(tokenizer, config.format, config.max_length)
    exams = renderer.exams([dict(row) for row in rows])
    with tempfile.TemporaryDirectory(prefix=".vllm-", dir=config.run_dir) as name:
        folder = Path(name)
        model, revision = _merged(config, folder / "model"), config.revision or None if config.method == BASE else None
        stop = ends(_generation_settings(model, revision), renderer)
        ask = {
            "model": model, "revision": revision,
            "dtype": precision(config, training=False).name, "max_model_len": config.max_length + config.max_new_tokens,
            "max_new_tokens": config.max_new_tokens, "stop": stop, "prompts": [e.prompt_ids for e in exams],
        }  # fmt: skip
        (folder / "ask.json").write_text(json.dumps(ask), encoding="utf-8")
        say(f"generating {len(rows)} replies with vLLM")
        done = subprocess.run([python, "-P", str(WORKER), str(folder / "ask.json")], check=False)
        if done.returncode:
            raise UserError(f"vLLM ended with exit code {done.returncode}; what it said stands above")
        made = read_json(folder / "replies.json", "replies")["replies"]
    return {str(row["id"]): until_stop(ids, stop) for row, ids in zip(rows, made, strict=True)}


def _generation_settings(model: str, revision: str | None) -> Any:
    """The model's own, by which vLLM stops too, or the library's where it has none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model, revision=revision)
    except OSError:
        return GenerationConfig()


def _merged(config: RunConfig, folder: Path) -> str:
    if config.method == BASE:
        return str(loadable(config.model))
    if config.technique.full:
        return str(saved_folder(config).resolve())
    say(export(config, folder))
    return str(folder)
