"""python scripts/eval.py [runs/NAME/RUN | --method METHOD]: generates test replies with a run and scores them; --method base is the untuned model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kit.cli import announced, each_seed, parser, run, run_flags
from kit.errors import UserError


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("run", nargs="?", help="folder of the run (default: the one that --name, --method and --seed mean)")
    options.add_argument("--seeds", metavar="N,N", help="run once for each of these seeds")
    options.add_argument("--rescore", action="store_true", default=False, help="score predictions.jsonl anew; no model is loaded")
    options.add_argument("--tasks", default=None, metavar="NAME,NAME", help="also run these tasks of lm-evaluation-harness on the saved model")
    options.add_argument("--tasks-path", default=None, metavar="DIR", help="folder with task definitions (YAML) of your own")
    options.add_argument("--tasks-limit", type=int, default=None, metavar="N", help="only the first N examples of each task")
    flags = options.parse()
    if flags["tasks"]:  # Tasks may fetch data of their own where model and data are local.
        os.environ.setdefault("HF_HUB_OFFLINE", "0")
    path, rescoring, names, own, limit = (flags.pop(k, None) for k in ("run", "rescore", "tasks", "tasks_path", "tasks_limit"))
    each_seed(flags, sys.argv[1:])
    if rescoring and names:
        raise UserError("--rescore loads no model; give --tasks in a call of its own")
    if path is not None:
        flags = run_flags(Path(path), flags)
    config = announced(flags)

    from kit import scoring, tasks
    from kit.evaluation import evaluate
    from kit.report.tables import evaluation_table, tasks_table

    wanted = tasks.check(names, own, limit) if names else []
    evaluation_table(config, scoring.rescore(config) if rescoring else evaluate(config))
    if wanted:
        tasks_table(config, tasks.run(config, wanted, own, limit))


if __name__ == "__main__":
    run(main)
