"""python scripts/report.py [--runs-dir DIR]: console tables and report/ (report.md, comparison_table.csv, summary.json, figures/) from the runs."""

from __future__ import annotations

from kit.cli import configure, run


def main() -> None:
    config = configure(__doc__ or "")

    from kit.console import say
    from kit.report.tables import comparison_table, verdict_table
    from kit.report.write import build

    results, notes, found = build(config)
    comparison_table(results.shown, found, f"Comparison: {config.name}")
    if found:
        verdict_table(found)
    for note in notes:
        say(f"note: {note}")
    say(f"report: {config.report_dir}/report.md")


if __name__ == "__main__":
    run(main)
