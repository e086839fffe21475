"""Kill runs at random moments (SIGKILL), go on, and compare with a run that was left alone.

    python -m tests.kills --count 20 --output benchmarks/results/kills.json

For each phase as many kills: at a random moment after the phase began, in a process of its own.
After each, every file under its final name must be readable; after `--resume` (training) or the
same command again (merging) all that was computed must be the same to the byte. The models are
tiny and random, so that the kills fall everywhere. A test makes one kill of each phase.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file

from osrm import bank
from osrm.commands import finish, merge, train
from osrm.config import MergeConfig, TrainConfig
from osrm.files import write_json
from osrm.training import UNFINISHED, TaskTrainer
from tests.conftest import make_tiny, small, write_data

# What begins each phase; a run is in it until the next of its phases, or its end.
PHASES: dict[str, list[tuple[Any, str]]] = {
    "features": [(bank, "collect")],
    "training": [(TaskTrainer, "train")],
    "saving": [(TaskTrainer, "_save_checkpoint"), (train, "save_run"), (finish, "publish")],
    "merging": [(merge.Merger, "save")],
}
# What may differ: measured times and memory, and whether --resume was given.
MAY_DIFFER = ("train_runtime", "seconds_", "peak_memory_", "merge_", "evaluation_peak", "resume")


@contextmanager
def on_entry(phase: str, act: Callable[[], None]) -> Any:
    """Call `act` whenever the phase begins."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in PHASES[phase]]

    def noted(original: Callable[..., Any]) -> Callable[..., Any]:
        def entering(*args: Any, **options: Any) -> Any:
            act()
            return original(*args, **options)

        return entering

    for owner, name, original in originals:
        setattr(owner, name, noted(original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a fork; its exit status as `os.waitpid` tells it.

    The parent only imports: it has no threads whose locks a fork would find taken for ever.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def killed(work: Callable[[], None], phase: str, entry: int, delay: float) -> bool:
    """Run `work`, and kill it `delay` seconds after the phase began for the `entry`-th time."""
    entries = 0

    def act() -> None:
        nonlocal entries
        entries += 1
        if entries == entry:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def watched() -> None:
        with on_entry(phase, act):
            work()

    return in_child(watched) == signal.SIGKILL


def durations(work: Callable[[], None], phase: str, note: Path) -> list[float]:
    """How long after each of its beginnings the phase's run went on, undisturbed.

    Args:
        note: a file for the answer of the child.
    """

    def watched() -> None:
        begun: list[float] = []
        with on_entry(phase, lambda: begun.append(time.monotonic())):
            work()
        ends = [*begun[1:], time.monotonic()]
        note.write_text(json.dumps([end - begin for begin, end in zip(begun, ends)]))

    assert in_child(watched) == 0
    return json.loads(note.read_text())


def content(directory: Path) -> dict[str, Any]:
    """What a finished run computed: all of its files, without measured times and memory.

    A kill may leave hidden files: a lock, which holds no one, or half of a file of the cache.
    """
    found: dict[str, Any] = {}
    for path in sorted(each for each in directory.rglob("*") if each.is_file()):
        name = str(path.relative_to(directory))
        if path.name.startswith("."):
            continue
        if path.name == "trainer_state.json" or path.suffix in (".md", ".csv", ".png"):
            found[name] = path.stat().st_size > 0  # times in another form
        elif path.suffix == ".json":
            text = path.read_text().replace(str(directory), "")
            found[name] = _computed(json.loads(text))
        else:
            found[name] = path.read_bytes()
    return found


def _computed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _computed(each) for k, each in value.items() if not k.startswith(MAY_DIFFER)}
    return [_computed(each) for each in value] if isinstance(value, list) else value


def check_readable(directory: Path) -> None:
    """Every file that has its final name is whole; a checkpoint that is named unfinished is none.

    Raises:
        Exception: of the library that reads it.
    """
    readers: dict[str, Callable[[Path], Any]] = {
        ".json": lambda path: json.loads(path.read_text()),
        ".safetensors": load_file,
        ".parquet": pd.read_parquet,
        ".pt": lambda path: zipfile.ZipFile(path).testzip(),
        ".pth": lambda path: zipfile.ZipFile(path).testzip(),
    }
    parts = {path.parent / path.read_text() for path in directory.rglob(UNFINISHED)}
    for path in directory.rglob("*"):
        names = path.relative_to(directory).parts
        temporary = any(name.startswith(".") for name in names) or parts & {*path.parents}
        if path.suffix in readers and not temporary:
            readers[path.suffix](path)


def kill_and_compare(
    phase: str,
    count: int,
    seed: int,
    begin: Callable[[Path], None],
    go_on: Callable[[Path], None],
    folder: Path,
) -> dict[str, int]:
    """{"kills", "same", "unreadable"}: `count` runs were killed, and as many must be the same.

    Args:
        begin, go_on: the command, and what is given after a kill; both write into a directory.
    """
    generator = random.Random(f"{phase}/{seed}")
    whole = folder / "whole" / "run"
    folder.mkdir()
    waits = durations(partial(begin, whole), phase, folder / "waits.json")
    expected = content(whole)
    found = {"kills": 0, "same": 0, "unreadable": 0}
    attempt = 0
    while found["kills"] < count:
        attempt += 1
        directory = folder / str(attempt) / "run"
        entry = generator.randrange(len(waits))
        delay = generator.uniform(0, waits[entry])
        if killed(partial(begin, directory), phase, entry + 1, delay):
            found["kills"] += 1
            try:
                check_readable(directory)
            except Exception as error:
                print(phase, attempt, repr(error))
                found["unreadable"] += 1
            assert in_child(partial(go_on, directory)) == 0
            ended = content(directory)
            found["same"] += ended == expected
            for name in {*ended, *expected}:
                if ended.get(name) != expected.get(name):
                    print(phase, attempt, name, "differs")
        shutil.rmtree(directory.parent)
    return found


def commands(
    phase: str, config: TrainConfig, paths: Path | None = None
) -> tuple[Callable[[Path], None], Callable[[Path], None]]:
    """How a run of the phase begins, and how it goes on.

    Args:
        paths: load_model_path.json of finished runs, for merging.
    """
    if phase != "merging":

        def run(directory: Path, resume: bool) -> None:
            bank.cache_dir = lambda: directory / "cache"
            train.train(replace(config, output_dir=str(directory), resume=resume))

        return partial(run, resume=False), partial(run, resume=True)

    def merge_all(directory: Path) -> None:
        bank.cache_dir = lambda: directory.parent / "cache"
        methods = ["task_arithmetic", "ties", "emr"]
        merge.run(
            MergeConfig(str(paths), methods, output_dir=str(directory), overwrite=True, scale=0.5)
        )

    return merge_all, merge_all


def main(argv: list[str] | None = None) -> None:
    """Kill as often as the flags say, print and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="kills a phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    args = parser.parse_args(argv)
    logging.disable()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone, data = folder / "tiny-roberta", folder / "data"
        assert in_child(partial(make_tiny, "roberta", backbone)) == 0
        write_data(data, ["rte", "sst2", "stsb"], train=60, validation=24)
        options = {"tasks": ["rte"], "init": "analytical", "epochs": 3}
        config = small({"roberta": backbone}, data, folder, **options)
        results = {}
        for phase in PHASES:
            paths = None
            if phase == "merging":
                runs = replace(config, tasks=["rte", "sst2", "stsb"], output_dir=f"{folder}/runs")
                assert in_child(partial(train.train, runs)) == 0
                (paths,) = (folder / "runs").glob("load_model_path-*.json")
            begin, go_on = commands(phase, config, paths)
            results[phase] = kill_and_compare(
                phase, args.count, args.seed, begin, go_on, folder / phase
            )
            print(phase, results[phase], flush=True)
    if args.output:
        write_json(args.output, {"seed": args.seed, **results})
    if any(
        len({each["kills"], each["same"]}) > 1 or each["unreadable"] for each in results.values()
    ):
        raise SystemExit("a killed run ended otherwise than one that was left alone")


if __name__ == "__main__":
    main()
