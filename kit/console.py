"""The only rich Console of the kit: full width off-terminal, foreign text escaped, a closed pipe outlived."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping

from rich.console import Console

for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # closed by whoever started this
    if getattr(sys, name) is None:
        setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
if os.environ.get("COLUMNS") == "0":  # a width that nobody knows; rich would print nothing
    del os.environ["COLUMNS"]

# Off-terminal rich assumes 80 columns and wraps tables in logs; COLUMNS still wins.
WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140
# What a terminal would obey or a reader could not see: controls, direction overrides, line separators, lone surrogates.
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Steady(Console):
    """Output that nobody reads any more ends nothing: a training goes on when the `tee` behind it has died."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = Steady(width=WIDTH, highlight=False, soft_wrap=False)


def say(text: str) -> None:
    """One line of progress, printed as it is: no markup, no wrapping."""
    console.print(text, markup=False, soft_wrap=True)


def counts(by_reason: Mapping[str, int]) -> str:
    """{"empty_reply": 3} -> "3 empty reply"; nothing counted is a dash."""
    return ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in sorted(by_reason.items())) or "—"


def printable(text: str) -> str:
    """Foreign text with everything that a terminal would obey spelled out: ESC reads \\x1b."""
    return UNSAFE.sub(lambda m: m[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))
