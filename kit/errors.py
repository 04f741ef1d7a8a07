"""Errors a user can cause: one line that says what was wrong and what to do, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Carries one message per problem found; `kit.cli.run` prints each on a line of its own."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """`unknown method 'qlroa'; did you mean 'qlora'?`, or the list of known names when nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"unknown {kind} {name!r}; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}")
