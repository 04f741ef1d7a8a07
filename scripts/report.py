"""python scripts/report.py [--runs-dir DIR]: console tables and report/ (report.md, .html, .pdf, comparison_table.csv, summary.json, figures/)."""

from __future__ import annotations

from pathlib import Path

from kit.cli import announced, parser, run


def main() -> None:
    flags = parser(__doc__ or "").parse()
    flags.pop("tuned", None)  # it asks for a method's sweep, and all methods are reported
    config = announced(flags)

    from kit.console import say
    from kit.report import study, tables
    from kit.report.verdicts import ledger
    from kit.report.write import build

    results, notes, found = build(config)
    tables.comparison_table(results.shown, found, f"Comparison: {config.name}")
    tables.source_table(results.shown)
    if found:
        tables.verdict_table(found)
    tables.fairness_lines(ledger(results))
    for note in notes:
        say(f"note: {note}")
    say(study.headline(results.shown, found))
    made = [ending for ending in (".md", ".html", ".pdf") if Path(config.report_dir, f"report{ending}").exists()]
    say(f"report: {config.report_dir}/report{', '.join(made)}")


if __name__ == "__main__":
    run(main)
