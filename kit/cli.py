"""The command line: argparse built from RunConfig, errors as one line each, exit codes 0, 2 (user error) and 130 (Ctrl-C)."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import io
import locale
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kit import processes
from kit.config import BASE, GROUPS, Field, RunConfig, fields, recipes
from kit.device import choose_recipe
from kit.errors import UserError, first_line, unknown
from kit.methods import METHODS
from kit.resources import is_memory_error
from kit.runs import load_config
from kit.settings import resolve

# Failures of the disk or its permissions: the user's to fix, so no traceback.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.EFBIG,
              errno.EEXIST, errno.ELOOP)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError, with a suggestion for a mistyped flag."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """The flags given, and only those, by field name."""
        known, rest = self.parse_known_args(argv)
        if rest:
            flags = [option for action in self._actions for option in action.option_strings]
            mistyped = [unknown("flag", r.partition("=")[0], flags) for r in rest if r.startswith("-")]
            raise UserError(*(mistyped or [f"unexpected argument {rest[0]!r}"]))
        given = vars(known)
        if empty := [k for k, v in given.items() if v == [] or (isinstance(v, list) and [] in v)]:  # what argparse makes of --flag=--
            raise UserError(f"--{empty[0].replace('_', '-')}: expected one argument")
        limit = given.pop("limit", None)
        if limit is not None:
            given = {"limit_train": limit, "limit_test": limit} | given
        return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def parser(about: str) -> Parser:
    """A parser with one flag for each RunConfig field; absent flags leave no value, so that recipes can fill in."""
    made = Parser(description=about, epilog="Values in [] are used where neither the recipe nor the method has its own.", usage="%(prog)s [FLAGS]",
                  argument_default=argparse.SUPPRESS, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    group: argparse._ActionsContainer = made
    for f in fields().values():
        group = made.add_argument_group(GROUPS[f.name]) if f.name in GROUPS else group
        _add(group, f)
    made.add_argument("--limit", type=int, metavar="N", help="use only the first N training and test rows (a trial)")
    made.add_argument("--valid", dest="valid_per_source", type=int, metavar="N", help="short for --valid-per-source")
    return made


def _add(made: argparse._ActionsContainer, f: Field) -> None:
    flag = f"--{f.name.replace('_', '-')}"
    text = f.help if f.default in (None, "", ()) or f.repeat else f"{f.help} [{f.default}]"
    if f.name == "method":
        text += f": {', '.join([*METHODS, BASE])}"
    if f.name == "recipe":
        text += f": {', '.join(['auto', *recipes()])}"
    if f.kind is bool:
        made.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif f.repeat:
        made.add_argument(flag, action="append", metavar=f.name.split("_")[0].upper(), help=text)
    else:
        made.add_argument(flag, type=f.kind, metavar={int: "N", float: "X"}.get(f.kind, f.name.split("_")[-1].upper()), help=text.replace("%", "%%"))


def configure(about: str, argv: Sequence[str] | None = None) -> RunConfig:
    """Parses the flags and resolves the configuration; says which recipe `auto` chose and why.

    With --seeds 0,1,2 the script runs once for each, every seed in a process of its own, and ends with the first failure's exit code.
    Beside a single one --seed, which is the more exact, counts.
    """
    options = parser(about)
    options.add_argument("--seeds", metavar="N,N", help="run once for each of these seeds")
    flags = options.parse(argv)
    each_seed(flags, list(sys.argv[1:] if argv is None else argv))
    return announced(flags)


def each_seed(flags: dict[str, Any], argv: list[str]) -> None:
    """Takes --seeds out of the flags: one seed is set there; for several the script runs again for each, and this process ends."""
    import subprocess

    seeds = flags.pop("seeds", None)
    if seeds is None:
        return
    numbers = seeds.split(",")
    if not all(n.isascii() and n.isdigit() for n in numbers):
        raise UserError(f"--seeds takes whole numbers with commas between them, such as 0,1,2; got {seeds!r}")
    if len(numbers) == 1:
        flags.setdefault("seed", int(seeds))
        return
    if "seed" in flags:
        raise UserError("give --seed or --seeds, not both")
    if processes.count() > 1:
        raise UserError("several processes take one --seed a command: start one command after another in place of --seeds")
    resolve(flags)
    at = next(i for i, a in enumerate(argv) if a.startswith("--seeds"))
    rest = argv[:at] + argv[at + (1 if "=" in argv[at] else 2) :]
    earlier = signal.getsignal(signal.SIGTERM)
    try:
        for number in numbers:
            process = subprocess.Popen([sys.executable, sys.argv[0], *rest, "--seed", number])
            # It saves and ends, and then so does this one.
            signal.signal(signal.SIGTERM, lambda *_, child=process: child.terminate())
            while process.returncode is None:
                with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches the process itself, which saves before it ends
                    process.wait()
            if process.returncode:
                sys.exit(process.returncode if process.returncode > 0 else 128 - process.returncode)  # a signal's, as a shell has it
    finally:
        signal.signal(signal.SIGTERM, earlier)
    sys.exit(0)


def run_flags(path: Path, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a run's path stands for: runs/NAME/METHOD-sSEED, and its own config.json when it has one."""
    given, path = path, path.resolve()
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) and len(path.relative_to(Path.cwd()).parts) > 2 else path
    if not (path / "config.json").exists():
        if path.name != BASE:
            raise UserError(f"{given} is no trained run: it has no config.json; train one with scripts/train.py")
        return {"method": BASE, "name": path.parent.name, "runs_dir": str(path.parent.parent)} | dict(flags)
    stored = load_config(path, {})
    if (stored.name, stored.run_name) != (path.parent.name, path.name):
        raise UserError(f"{given} was renamed or copied: it holds the run {stored.name}/{stored.run_name}; give its folders these names again")
    identity = {k: v for k, v in dataclasses.asdict(stored).items() if k in stored.identity()}
    return identity | {"runs_dir": str(path.parent.parent)} | dict(flags)


def trained_run(flags: dict[str, Any]) -> RunConfig:
    """The configuration that a run was made with: of the folder under "run", else of the one that --name, --method and --seed mean."""
    path = flags.pop("run", None)
    return announced(run_flags(Path(path) if path else resolve(flags).run_dir, flags))


def announced(flags: Mapping[str, Any]) -> RunConfig:
    """The configuration that the flags ask for. Says which recipe `auto` chose and why, and keeps the libraries' network habits to what the run needs."""
    config = resolve(flags)
    # Both report usage home unless told not to.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    # Unsloth sends it as it stands, and an empty one, or one pasted with its line end, cannot be sent.
    if token := os.environ.pop("HF_TOKEN", "").strip():
        os.environ["HF_TOKEN"] = token
    if config.is_local:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if flags.get("recipe", "auto") == "auto":
        from kit.console import say

        say(f"recipe {config.recipe}: {choose_recipe().reason}")
    return config


def explained(error: Exception) -> str | None:
    """What is the user's to mend, in a line; None for what is not."""
    said = first_line(error)
    if is_memory_error(error):
        return f"out of memory ({said}); the same command goes on when there is more"
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return f"{error.filename or 'writing'}: {error.strerror}; what was there before is unchanged"
    # The libraries that write weights say so in errors of their own.
    if any(text in str(error) for text in ("No space left on device", "PytorchStreamWriter failed writing")):
        return f"the disk is full, or writing failed: {said}; the same command goes on when there is room"
    if isinstance(error, ImportError) and re.search("pip install|not installed|(lease|need to) install", said):  # the package of an optimiser, say
        return said
    return None


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a script's main: a UserError becomes its lines on stderr and exit code 2."""
    # Else libraries would read and write files in that locale. Told to ignore its environment, Python would start anew for ever.
    if not sys.flags.utf8_mode and not sys.flags.ignore_environment and locale.getencoding().lower() != "utf-8":
        os.execve(sys.executable, sys.orig_argv, os.environ | {"PYTHONUTF8": "1"})
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # A terminal without a tick, or with none of these letters, costs no result.
            stream.reconfigure(errors="replace")
    try:
        main()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # Whoever read the output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if (line := explained(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once more would end in a traceback of the libraries' farewells
        print(str(stop) or "stopped; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
