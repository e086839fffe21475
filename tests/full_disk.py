"""Let runs fill the disk, make room, go on, and compare with a run that was left alone.

    unshare --mount --map-root-user python -m tests.full_disk

The disk is a file system in memory, which Linux lets everyone mount in a namespace of their own. It
has room for 4 KiB, or 1/8, 2/8, ... of what the run takes; so it is full at one file after another.
The run must end with code 2 and one line, no file under a final name may be unreadable, and the
same command with room must end as if nothing had been. On a read-only disk it must end at once.
"""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from osrm.commands.train import train
from osrm.errors import run_script
from tests.conftest import make_tiny, small, write_data
from tests.kills import check_readable, commands, content

STEPS = 8


def size(directory: Path) -> int:
    """Bytes of all files, each in whole pages of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in directory.rglob("*"))


def mount(directory: Path, options: str) -> None:
    """Mount a file system in memory, or mount it anew with other options."""
    command = ["mount", "-t", "tmpfs", "tmpfs", str(directory), "-o", options]
    subprocess.run(command, check=True)


def refused(run: Callable[[], None]) -> str:
    """The line that a run ended with, which is all it said; "" if it went well."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        code = run_script(run)
    lines = [each for each in printed.getvalue().splitlines() if ": error: " in each]
    assert (code, len(lines)) in ((0, 0), (2, 1)), printed.getvalue()
    return "".join(lines)


@contextlib.contextmanager
def disk(directory: Path, options: str) -> Iterator[None]:
    """A file system there, until the end of `with`."""
    directory.mkdir()
    mount(directory, options)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill_and_compare(
    begin: Callable[[Path], None], go_on: Callable[[Path], None], folder: Path
) -> int:
    """How many runs of the command found the disk full; all end alike when there is room.

    Args:
        begin, go_on: the command, and the one that goes on; both write into a directory.
    """
    begin(folder / "whole" / "run")
    expected = content(folder / "whole" / "run")
    needed = size(folder / "whole")
    full = 0
    for step in range(STEPS):
        directory = folder / str(step) / "run"
        with disk(directory.parent, f"size={4096 + step * needed // STEPS}"):
            told = refused(partial(begin, directory))
            full += bool(told)
            assert not told or "the disk is full" in told, told
            check_readable(directory)
            mount(directory.parent, "remount,size=1g")
            go_on(directory)
            assert content(directory) == expected, f"step {step}"
    with disk(folder / "read-only", "ro"):
        assert "is read-only" in refused(partial(begin, folder / "read-only" / "run"))
    return full


def main() -> None:
    """Train and merge tiny models; raise AssertionError unless all ends well."""
    logging.disable()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone = make_tiny("roberta", folder / "tiny-roberta")
        data = write_data(folder / "data", ["rte", "sst2", "stsb"], train=60, validation=24)
        options = {"init": "analytical", "epochs": 2}
        config = small({"roberta": backbone}, data, folder, tasks=["rte"], **options)
        runs = replace(config, tasks=["rte", "sst2"], output_dir=f"{folder}/runs")
        train(runs)
        (paths,) = (folder / "runs").glob("load_model_path-*.json")
        for phase in ("training", "merging"):
            (folder / phase).mkdir()
            full = fill_and_compare(*commands(phase, config, paths), folder / phase)
            print(f"{phase}: the disk was full in {full} of {STEPS} runs")
            assert full > STEPS // 2


if __name__ == "__main__":
    main()
