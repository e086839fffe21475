"""Files and directories that appear under their names only when they are whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from osrm import processes
from osrm.errors import UserError


def cache_dir() -> Path:
    """`$OSRM_CACHE`, or `~/.cache/osrm`."""
    return Path(os.environ.get("OSRM_CACHE") or "~/.cache/osrm").expanduser()


def check_output(directory: Path) -> None:
    """Refuse, with a UserError, an --output-dir that could not be written to."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--output-dir {directory}: {there} is no directory; choose another")
    if not os.access(there, os.W_OK):
        raise UserError(f"--output-dir {directory}: {there} is read-only; choose another")


@contextmanager
def locked(*directories: Path) -> Iterator[None]:
    """Keep other runs out of these directories, and remove what killed runs left in them.

    The lock of a run that dies is free again. Of several processes the first locks for all.
    Raises UserError if another run has locked one of them.
    """
    with ExitStack() as stack:
        for directory in directories if processes.is_first() else ():
            stack.enter_context(_locked(directory))
        processes.barrier()
        yield


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    path = directory.with_name(f".{directory.name}.lock")
    new = [parent for parent in path.absolute().parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        fix = "wait for it, or choose another --output-dir"
        raise UserError(f"{directory}: another run is at work there; {fix}") from None
    try:
        _recover(directory)
        yield
    finally:
        path.unlink()
        lock.release()
        with suppress(OSError):  # not empty: something was written
            for parent in new:
                parent.rmdir()


def _recover(directory: Path) -> None:
    """Remove what a killed run left unfinished in or beside `directory`."""
    beside = re.compile(rf"\.{re.escape(directory.name)}\.\d+(\.old)?")
    left = [path for path in directory.parent.iterdir() if beside.fullmatch(path.name)]
    for path in left:
        if path.suffix == ".old" and not directory.exists():
            path.replace(directory)  # it was killed between the two steps of `staged`
    for path in [*left, *directory.glob(".*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON; the file appears under its name only when it is whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file; it appears under its name only when it is whole."""
    with written(path) as temporary:
        # A file's name in another encoding is no text: it is written as an escape.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary path for a file that gets its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    yield temporary
    temporary.replace(path)


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A temporary directory that becomes `directory`, in place of any old one, if all goes well."""
    staging = directory.with_name(f".{directory.name}.{os.getpid()}")
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    staging.mkdir(parents=True)
    try:
        yield staging
        if directory.exists():
            directory.replace(old)
        staging.replace(directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(source: Path, target: Path) -> None:
    """Move the files of `source` into the existing directory `target`, each at once."""
    for path in sorted(source.iterdir()):
        path.replace(target / path.name)
    source.rmdir()
