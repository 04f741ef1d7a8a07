"""python scripts/chat.py [runs/NAME/RUN | --method METHOD]: a conversation with the tuned model; /base shows what the untuned one says."""

from __future__ import annotations

from kit.cli import parser, run, trained_run


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("run", nargs="?", help="folder of the run (default: the one that --name, --method and --seed mean)")
    config = trained_run(options.parse())

    from kit.chat import chat

    chat(config)


if __name__ == "__main__":
    run(main)
