"""An outside check: tasks of lm-evaluation-harness (Gao et al.) on a run's saved model -> tasks.json."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
from pathlib import Path
from typing import Any

from kit import runs
from kit.config import RunConfig
from kit.errors import UserError, unknown
from kit.files import write_json
from kit.generation import LOGITS
from kit.hub import hub_errors
from kit.model import import_unsloth, load_trained

VERSION = "0.4.13"
# The harness holds the logits of a whole batch: so many rows of so many tokens must fit.
ROWS, LONG = 32, 512


def check(names: str, folder: str | None, limit: int | None) -> list[str]:
    """The tasks' names; what cannot work is a UserError before anything is loaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"--tasks needs lm-evaluation-harness, which is not installed; run: python -m pip install lm-eval=={VERSION}")
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--tasks-path: no such folder: {folder}")
    if limit is not None and limit <= 0:
        raise UserError(f"--tasks-limit must be greater than 0, got {limit}")
    wanted = [name.strip() for name in names.split(",")]
    known = _manager(folder).all_tasks
    if problems := [unknown("task", name, known) for name in wanted if name not in known]:
        raise UserError(*problems)
    return wanted


@functools.cache
def _manager(folder: str | None) -> Any:
    """The harness's index of tasks: its own and those of the folder, which win."""
    import_unsloth()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def run(config: RunConfig, names: list[str], folder: str | None, limit: int | None) -> dict[str, Any]:
    """Runs the tasks on the model as it is evaluated (adapter and 4-bit base alike), in the run's own prompt format where that is a chat."""
    manager = _manager(folder)
    model, tokenizer, _ = load_trained(config)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    rows = min(ROWS, LOGITS // (LONG * model.config.get_text_config().vocab_size))
    chat = config.format == "chat"
    with hub_errors(f"tasks {', '.join(names)}"):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=max(1, rows))
        found = simple_evaluate(harness, tasks=list(names), task_manager=manager, limit=limit, apply_chat_template=chat, log_samples=False)
    versions = {"lm_eval": importlib.metadata.version("lm_eval")} | {task: str(v) for task, v in found["versions"].items()}
    tasks = {task: scores(made) for task, made in found["results"].items()}
    record = {"schema": runs.SCHEMA, "tasks": tasks, "limit": limit, "versions": versions, "chat_template": chat}
    write_json(config.run_dir / "tasks.json", record)
    return record


def scores(made: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """{"acc": {value, stderr}} from the harness's {"acc,none": ..., "acc_stderr,none": ...}; a filter other than none is named."""

    def number(value: Any) -> float | None:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

    out = {}
    for key, value in made.items():
        metric, _, kept = key.partition(",")
        if kept and not metric.endswith("_stderr"):
            out[metric if kept == "none" else f"{metric} ({kept})"] = {"value": number(value), "stderr": number(made.get(f"{metric}_stderr,{kept}"))}
    return out
