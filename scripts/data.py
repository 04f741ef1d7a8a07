"""python scripts/data.py [--source alpaca=FILE ...]: builds data/NAME/{train,test}.jsonl and the manifest that accounts for every row."""

from __future__ import annotations

from kit.cli import announce, parser, run
from kit.config import resolve


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--overwrite", action="store_true", default=False, help="rebuild data that exists")
    flags = options.parse()
    overwrite = flags.pop("overwrite")
    config = resolve(flags)
    announce(config, flags)

    from kit.dataset import prepare
    from kit.report.tables import data_table

    data_table(prepare(config, overwrite=overwrite), config.data_path)


if __name__ == "__main__":
    run(main)
