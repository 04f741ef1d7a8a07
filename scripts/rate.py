"""python scripts/rate.py [--rater NAME]: scores the runs' replies by hand, blind, one key a score; --export and --import do it in a spreadsheet."""

from __future__ import annotations

import shlex
from pathlib import Path

from kit.cli import announced, parser, run
from kit.errors import UserError


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--rater", default=None, metavar="NAME", help="whose scores these are: names runs/NAME/ratings/RATER.jsonl [rater]")
    options.add_argument("--items", type=int, default=100, metavar="N", help="replies to rate, in whole test rows, repeats not counted [100]")
    options.add_argument("--overall", action="store_true", default=False, help="one score instead of fluency, coherence and correctness")
    options.add_argument("--export", default=None, metavar="FILE.csv", help="write the replies to a blind CSV to be filled elsewhere")
    options.add_argument("--import", default=None, metavar="FILE.csv", help="read a filled CSV back; needs --rater")
    flags = options.parse()
    rater, items, overall, target, filled = (flags.pop(k) for k in ("rater", "items", "overall", "export", "import"))
    if items <= 0:
        raise UserError(f"--items must be greater than 0, got {items}")
    if filled and (target or not rater):
        raise UserError("--import needs --rater, and no --export")
    flags.pop("tuned", None)  # it asks for one method's sweep
    config = announced(flags)

    from kit.console import say
    from kit.rating import screen, sheet
    from kit.rating.deck import deck, evaluated
    from kit.rating.ledger import CRITERIA, OVERALL

    folder, rater = Path(config.runs_dir) / config.name, rater or "rater"
    criteria = OVERALL if overall else CRITERIA
    if filled:
        say(f"{sheet.import_csv(Path(filled), folder, rater, overall=overall)} new ratings by {rater} from {filled}")
    elif target:
        cards = deck(evaluated(folder), rater, limit=items, seed=config.data_seed)
        sheet.export_csv(Path(target), cards, criteria)
        say(f"{len(cards)} replies in {target}; fill in 0 to 5, then: python scripts/rate.py --import {shlex.quote(target)} --name {config.name} --rater YOU")
    else:
        screen.rate(folder, rater, criteria=criteria, limit=items, seed=config.data_seed)


if __name__ == "__main__":
    run(main)
