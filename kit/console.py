"""The only rich Console of the kit: full width off-terminal, foreign text escaped."""

from __future__ import annotations

import os
import sys

from rich.console import Console

# Off-terminal rich assumes 80 columns and wraps tables in logs; COLUMNS still wins.
WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140

console = Console(width=WIDTH, highlight=False, soft_wrap=False)


def say(text: str) -> None:
    """One line of progress, printed as it is: no markup, no wrapping."""
    console.print(text, markup=False, soft_wrap=True)
