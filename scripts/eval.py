"""python scripts/eval.py [runs/NAME/RUN | --method METHOD]: generates test replies with a run and scores them; --method base is the untuned model."""

from __future__ import annotations

import sys
from pathlib import Path

from kit.cli import announce, each_seed, parser, run, run_flags
from kit.config import RunConfig, resolve


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("run", nargs="?", help="folder of the run (default: the one that --name, --method and --seed mean)")
    options.add_argument("--seeds", metavar="N,N", help="run once for each of these seeds")
    flags = options.parse()
    each_seed(flags, sys.argv[1:])
    path = flags.pop("run", None)
    if path is not None:
        flags = run_flags(Path(path), flags)
    config: RunConfig = resolve(flags)
    announce(config, flags)

    from kit.evaluation import evaluate
    from kit.report.tables import evaluation_table

    evaluation_table(config, evaluate(config))


if __name__ == "__main__":
    run(main)
