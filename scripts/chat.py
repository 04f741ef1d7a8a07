"""python scripts/chat.py [runs/NAME/RUN | --method METHOD]: a conversation with the tuned model; /base shows what the untuned one says."""

from __future__ import annotations

import sys

from kit.chat import aside, chat
from kit.cli import parser, run, trained_run


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("run", nargs="?", help="folder of the run (default: the one that --name, --method and --seed mean)")
    flags, replies = options.parse(), sys.stdout
    with aside():
        chat(trained_run(flags), replies)


if __name__ == "__main__":
    run(main)
