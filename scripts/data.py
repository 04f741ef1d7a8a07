"""python scripts/data.py [--source alpaca=FILE ...]: builds data/NAME/{train,test}.jsonl and the manifest that accounts for every row."""

from __future__ import annotations

from kit.cli import announced, parser, run
from kit.config import BASE
from kit.errors import UserError


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--overwrite", action="store_true", default=False, help="rebuild data that exists")
    options.add_argument("--inspect", action="store_true", default=False, help="show lengths, turns, scripts, duplicates and leaks")
    options.add_argument("--show", type=int, default=0, metavar="N", help="show N training rows with the supervised tokens marked")
    flags = options.parse()
    overwrite, inspect, show = (flags.pop(k) for k in ("overwrite", "inspect", "show"))
    if show < 0:
        raise UserError(f"--show takes a number of rows, got {show}")
    config = announced(flags)

    from kit.dataset import manifest_of, prepare
    from kit.report.tables import data_table, inspect_tables, show_rows

    if "method" in flags and config.method != BASE and (overwrite or manifest_of(config) is None):
        from kit.preflight import possible

        possible(config)  # before data and base model take their time
    manifest = prepare(config, overwrite=overwrite)
    data_table(manifest, config.data_path)
    if inspect:
        inspect_tables(manifest, config.data_path)
    if show:
        show_rows(config, show)


if __name__ == "__main__":
    run(main)
