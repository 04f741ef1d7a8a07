"""Reading and writing results: a file exists only when it is complete (write beside, fsync, rename)."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole; a kill or a full disk at any moment leaves the old file or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        error.filename = str(path)  # A full disk names none, and a folder that is not there the file beside.
        raise
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """NaN and Infinity are not JSON: they raise ValueError here and not in whoever reads the file."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, *needed: str) -> Any:
    """The object in a JSON file; one that is damaged, unreadable or without the needed keys is a UserError that names it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run the stage that makes it again") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it and run the stage again") from None
    if not isinstance(found, dict) or (missing := [key for key in needed if key not in found]):
        lacks = f"it has no {', '.join(missing)}" if isinstance(found, dict) else f"it holds no object but {type(found).__name__}"
        raise UserError(f"{path}: cannot be read ({lacks}); remove it and run the stage again")
    return found


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file, split on newline bytes alone; a malformed line is a UserError with file and line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
            yield row


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(file: Any, *, wait: bool = False) -> None:
    """Locks an open file or folder until it is closed; BlockingIOError where another process has it. Some network file systems cannot: that is said."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
            raise
        from kit.console import say

        say("this file system cannot lock: start no second command on the same run or data while this one works")


@contextmanager
def held(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keeps a folder for this block; where another process is in one for it, waits or raises a UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock(handle, wait=wait)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process; wait for it to end, or choose another --name") from None
        yield
    finally:
        os.close(handle)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the target's place only when the block succeeds; until then the target stays as it was."""
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}.building")
    retired = target.with_name(f".{target.name}.retired")
    for leftover in (building, retired):
        shutil.rmtree(leftover, ignore_errors=True)
    building.mkdir()
    try:
        yield building
        if target.exists():
            target.rename(retired)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)
