"""python scripts/doctor.py [--json]: what this machine has, what the kit would do with it, and what to do where something is wrong."""

from __future__ import annotations

import contextlib
import json
import sys

from kit.cli import announced, parser, run
from kit.errors import UserError


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--json", action="store_true", default=False, help="print one JSON object instead of lines")
    flags = options.parse()
    as_json = flags.pop("json")
    flags.pop("tuned", None)  # what a machine can do hangs on no sweep
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):  # the libraries greet on standard output
        config = announced(flags)

        from kit.doctor import checks

        found = checks(config)
    wrong = [check for check in found if check.ok is False]
    if as_json:
        print(json.dumps({"schema": 1, "recipe": config.recipe, "usable": not wrong, "checks": [c._asdict() for c in found]}))
    else:
        for check in found:
            print(f"{'✗' if check.ok is False else '✓' if check.ok else '·'} {check.name:<10} {check.detail}")
    if wrong:
        raise UserError(*dict.fromkeys(f"{check.name}: {check.fix}" for check in wrong))


if __name__ == "__main__":
    run(main)
