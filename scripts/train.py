"""python scripts/train.py --method dora: trains one method into runs/NAME/METHOD-sSEED; builds missing data first."""

from __future__ import annotations

from kit.cli import configure, run


def main() -> None:
    config = configure(__doc__ or "")

    from kit.report.tables import training_table
    from kit.training import train

    training_table(config, train(config))


if __name__ == "__main__":
    run(main)
