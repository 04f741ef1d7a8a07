"""python scripts/export.py [runs/NAME/RUN | --method METHOD] --out DIR: the run's model merged in 16 bits, for any engine to serve."""

from __future__ import annotations

from pathlib import Path

from kit.cli import parser, run, trained_run
from kit.errors import UserError


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("run", nargs="?", help="folder of the run (default: the one that --name, --method and --seed mean)")
    options.add_argument("--out", metavar="DIR", help="folder to write; it must not exist yet")
    flags = options.parse()
    target = flags.pop("out", None)
    if not target:
        raise UserError("--out DIR is needed (to make: OUT=DIR): the folder to write the model to")
    config = trained_run(flags)

    from kit.console import say
    from kit.export import export

    say(export(config, Path(target)))
    say(f"{target} holds the model, its tokenizer and README.md")


if __name__ == "__main__":
    run(main)
