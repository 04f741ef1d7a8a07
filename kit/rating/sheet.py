"""The deck as a blind CSV for raters without the kit, and a filled one back."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from kit.console import printable
from kit.errors import UserError
from kit.files import write_text
from kit.rating.deck import Item, evaluated
from kit.rating.ledger import CRITERIA, OVERALL, SCALE, open_ledger, standing

SHOWN = 10  # problems of a file, that a wrong one does not fill the screen
FEWEST = 5  # replies of which two people don't give all the same scores
FORMULA = tuple("=+-@\t＝＋－＠")  # a spreadsheet runs a cell that starts so


def export_csv(path: Path, cards: Sequence[Item], criteria: Sequence[str]) -> None:
    """The deck as a blind CSV with empty score columns. No cell can run as a formula: an apostrophe goes before what would."""
    if path.exists():
        raise UserError(f"{path} exists; choose another file")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["item", "prompt", "reply", *criteria])
    for card in cards:
        cells = [printable(cell) for cell in (card.id, card.prompt, card.reply)]
        writer.writerow([f"'{cell}" if cell.startswith(FORMULA) else cell for cell in cells] + [""] * len(criteria))
    write_text(path, "\ufeff" + text.getvalue())  # without the mark Excel takes UTF-8 for the local code page


def import_csv(path: Path, folder: Path, rater: str, *, overall: bool = False) -> int:
    """Adds a filled CSV's scores to the rater's ledger, all or none; returns how many rows were new. Empty scores are not rated.

    Without `overall` the columns say which criteria are meant.
    """
    known = evaluated(folder)
    criteria, scores = _filled(path, known, overall=overall)
    if not scores:
        raise UserError(f"{path} holds no score: fill in {', '.join(criteria)}, 0 to 5")
    if other := _same_scores(folder, rater, scores):
        raise UserError(f"{path}: all {len(scores)} rows have the scores of {other}; one person's scores count once, so they are not taken as {rater}'s")
    with open_ledger(folder, rater, criteria) as ledger:
        fresh = {i: s for i, s in scores.items() if ledger.standing.get(i, {}).get("scores") != s}
        for item, given in fresh.items():
            ledger.add(known[item], given)
    return len(fresh)


def _same_scores(folder: Path, rater: str, scores: Mapping[str, Mapping[str, int]]) -> str | None:
    """Another rater who gave all of these scores; of a few replies two people may well say the same."""
    for path in sorted((folder / "ratings").glob("*.jsonl")) if len(scores) >= FEWEST else ():
        given = standing(path)
        if path.stem != rater and all(item in given and given[item]["scores"] == said for item, said in scores.items()):
            return path.stem
    return None


def _filled(path: Path, known: Mapping[str, Item], *, overall: bool) -> tuple[Sequence[str], dict[str, dict[str, int]]]:
    """The criteria and {item id: scores} of a filled CSV; commas, semicolons or tabs; every problem is reported with its line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save it as CSV in UTF-8") from None
    csv.field_size_limit(2**31 - 1)  # a prompt may be longer than the default of 131,072 characters
    reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=text.partition("\n")[0].count))
    header = [cell.strip() for cell in next(reader, [])]
    criteria = OVERALL if overall or OVERALL[0] in header else CRITERIA
    if missing := [column for column in ("item", *criteria) if column not in header]:
        raise UserError(f"{path}, line 1: no column {', '.join(missing)}")
    scores: dict[str, dict[str, int]] = {}
    problems, seen, end = [], dict[str, int](), reader.line_num
    for cells in reader:
        line, end = end + 1, reader.line_num
        row = dict(zip(header, (cell.strip().removeprefix("'") for cell in cells), strict=False))
        if not any(row.values()):
            continue
        given = {c: row[c] for c in criteria if row.get(c)}
        problems += [f"{path}, line {line}: {c} is {v!r}, not one of 0 to 5" for c, v in given.items() if v not in [*SCALE]]
        item = row.get("item", "")
        if item not in known:
            problems.append(f"{path}, line {line}: unknown item {item!r}; it is of another experiment, or its reply has changed since the export")
        if item in seen:
            problems.append(f"{path}, line {line}: item {item!r} is in line {seen[item]} already")
        seen[item] = line
        if given and not problems:
            scores[item] = {c: int(v) for c, v in given.items()}
    if problems:
        more = [f"and {len(problems) - SHOWN} problems more"] if len(problems) > SHOWN else []
        raise UserError(*problems[:SHOWN], *more)
    return criteria, scores
