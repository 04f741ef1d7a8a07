"""What a user waits for before anything happens: fresh processes that print help or an error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit.bench.harness import Peaks, interleave, summary
from kit.config import RunConfig
from kit.errors import UserError

ROOT = Path(__file__).parent.parent.parent


def startup(_: RunConfig, rounds: int) -> dict[str, Any]:
    """Help of training and of the report, a wrong flag, and Make's list; memory is the largest process's."""
    peaks: Peaks = {}

    def script(name: str, *flags: str) -> tuple[str, ...]:
        return sys.executable, str(ROOT / "scripts" / f"{name}.py"), *flags

    lines = {"train --help": (0, script("train", "--help")), "report --help": (0, script("report", "--help")),
             "wrong flag": (2, script("train", "--methd", "lora")), "make help": (0, ("make", "help"))}  # fmt: skip
    times = interleave({name: command(name, expected, *words, peaks=peaks) for name, (expected, words) in lines.items()}, rounds)[0]
    return summary("startup", times, peaks, [])


def command(name: str, expected: int, *words: str, peaks: Peaks) -> Callable[[], object]:
    """Runs a command that must end with the exit code `expected`, and notes its peak memory (GiB), or its largest child's."""

    def started() -> None:
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != expected:
            raise UserError(f"{' '.join(words)} ended with exit code {process.returncode}, expected {expected}")
        peaks[name] = used.ru_maxrss / 2**20  # KiB on Linux

    return started
