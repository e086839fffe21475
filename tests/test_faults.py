"""Faults, each brought about: signals, kills, locks, a diverging loss. No work is lost or false."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

from osrm.commands.train import train
from osrm.errors import Diverged, Interrupted, UserError, run_script
from osrm.files import locked, staged, write_text
from osrm.runs import run_dir
from osrm.training import TaskTrainer
from tests import kills
from tests.conftest import ROOT, small


class SignalAt(TrainerCallback):
    """What a batch system does before it kills."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(self.number)


def signal_at(monkeypatch, step: int, number: signal.Signals) -> None:
    def interrupted(*arguments, **options):
        return TaskTrainer(*arguments, **options, callbacks=[SignalAt(step, number)])

    monkeypatch.setattr("osrm.training.TaskTrainer", interrupted)


@pytest.fixture(scope="module")
def undisturbed(tiny, tiny_data, tmp_path_factory) -> Path:
    """What THREE_EPOCHS write without a fault."""
    folder, cache = (tmp_path_factory.mktemp(name) for name in ("undisturbed", "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("osrm.bank.cache_dir", lambda: cache)
        train(small(tiny, tiny_data, folder, **THREE_EPOCHS))
    return folder


THREE_EPOCHS = {"tasks": ["rte"], "epochs": 3, "init": "analytical", "per_device_train_bsz": 16}


@pytest.mark.parametrize(
    "step, number",
    [(1, signal.SIGTERM), (3, signal.SIGINT), (4, signal.SIGTERM), (11, signal.SIGINT)],
    ids=["first", "last of an epoch", "next", "last"],
)
def test_a_signal_leaves_a_checkpoint_and_the_run_ends_as_if_undisturbed(
    tiny, tiny_data, tmp_path, undisturbed, monkeypatch, capfd, step, number
):
    """Four steps an epoch; dropout and the order of the examples go on where they were."""
    config = small(tiny, tiny_data, tmp_path, **THREE_EPOCHS)
    signal_at(monkeypatch, step, number)
    before = signal.getsignal(signal.SIGTERM)
    capfd.readouterr()
    assert run_script(partial(train, config)) == 128 + number
    assert f"error: stopped by {number.name}; --resume goes on" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    directory = run_dir(config, "rte")
    assert (directory / "args.json").exists() and not (directory / "metrics.json").exists()
    with pytest.raises(UserError, match=r"lr was 0.01, is 0.02"):
        train(replace(config, lr=2e-2, resume=True))
    train(replace(config, resume=True))
    assert kills.content(tmp_path) == kills.content(undisturbed)
    log = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    assert [each["epoch"] for each in log if "eval_loss" in each] == [1, 2, 3]


def test_a_run_whose_last_step_is_done_resumes_without_a_step(
    tiny, tiny_data, tmp_path, monkeypatch
):
    """The newest checkpoint is that of the end; with the best epoch it is that of the best."""
    options = {"tasks": ["rte"], "epochs": 1, "not_load_best_model_at_end": True}
    config = small(tiny, tiny_data, tmp_path / "a", **options)
    signal_at(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Interrupted, match="goes on after the last step"):
        train(config)
    monkeypatch.undo()
    monkeypatch.setattr(TaskTrainer, "training_step", lambda *_: pytest.fail("a step"))
    train(replace(config, resume=True))
    monkeypatch.undo()
    train(replace(config, output_dir=str(tmp_path / "b")))
    assert kills.content(tmp_path / "a") == kills.content(tmp_path / "b")


def test_the_same_command_twice_gives_the_same_bytes(tiny, tiny_data, tmp_path):
    for name in "ab":
        train(small(tiny, tiny_data, tmp_path / name, tasks=["sst2"], init="contrastive"))
    assert kills.content(tmp_path / "a") == kills.content(tmp_path / "b")


@pytest.mark.sweep
def test_a_run_killed_in_any_phase_ends_as_if_left_alone():
    """`tests.kills` says otherwise by its exit code; in a process whose forks find no threads."""
    command = [sys.executable, "-m", "tests.kills", "--count", "1"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600, capture_output=True)


@pytest.mark.sweep
def test_a_full_or_read_only_disk_is_one_line_and_nothing_is_lost():
    """On real file systems: `tests.full_disk`."""
    own = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*own, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system lets no one mount a file system of their own")
    command = [*own, sys.executable, "-m", "tests.full_disk"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600, capture_output=True)


def test_a_killed_checkpoint_is_not_gone_on_from(
    tiny, tiny_data, tmp_path, undisturbed, monkeypatch
):
    """Of a run that was killed while it saved, the checkpoint before counts."""
    config = small(tiny, tiny_data, tmp_path, **THREE_EPOCHS)
    saved = []

    def killed(self, output_dir):
        saved.append(Path(output_dir))
        if len(saved) == 2:
            (saved[1] / "adapter_model.safetensors").write_bytes(b"half")
            raise SystemExit
        return save_rng_state(self, output_dir)

    save_rng_state = TaskTrainer._save_rng_state
    monkeypatch.setattr(TaskTrainer, "_save_rng_state", killed)
    with pytest.raises(SystemExit):
        train(config)
    monkeypatch.undo()
    assert saved[1].exists()
    train(replace(config, resume=True))
    assert kills.content(tmp_path) == kills.content(undisturbed)


def test_a_loss_that_is_not_finite_stops_its_task_alone(tiny, tiny_data, tmp_path, monkeypatch):
    """The step and the rate are named, the exit code says so, and the other tasks go on."""
    step = Trainer.training_step

    def poisoned(self, model, *args, **options):
        if "rte" in self.args.output_dir and self.state.global_step == 2:
            with torch.no_grad():
                next(each for each in model.parameters() if each.requires_grad).fill_(torch.nan)
        return step(self, model, *args, **options)

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    config = small(tiny, tiny_data, tmp_path, tasks=["rte", "sst2"], epochs=2)
    with pytest.raises(Diverged, match=r"^rte: the loss of step 3 is not finite.* 0\.01;"):
        train(config)
    assert Diverged.code == 3
    assert not (run_dir(config, "rte") / "metrics.json").exists()
    assert (run_dir(config, "sst2") / "metrics.json").exists()
    (paths,) = tmp_path.glob("load_model_path-*.json")
    assert [*json.loads(paths.read_text())] == ["sst2"]


HOLD = """
import sys, time
from pathlib import Path
from osrm.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_the_same_directory_refuses_until_the_first_is_dead(tmp_path):
    directory = tmp_path / "out" / "run"
    first = subprocess.Popen([sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"locked\n"
    with (
        pytest.raises(UserError, match=r"run: another run is at work there; wait"),
        locked(directory),
    ):
        pass
    with locked(directory.with_name("another")):
        pass
    first.kill()
    first.wait()
    assert directory.with_name(".run.lock").exists()
    with locked(directory):
        pass
    assert not directory.with_name(".run.lock").exists()


def test_a_lock_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "a" / "b" / "run", tmp_path / "a" / "run"):
        raise RuntimeError
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "a").mkdir()
    with locked(tmp_path / "a" / "run"):
        pass
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_replacement_that_is_killed_leaves_the_old_or_the_new(tmp_path, monkeypatch, renames):
    """Killed before the first of its renames, between them, or after both."""
    directory = tmp_path / "merged"
    for content in ("old", "new"):
        left = [renames if content == "new" else 2]

        def replace(self, target, left=left):
            if not left[0]:
                os._exit(0)
            left[0] -= 1
            self.rename(target)

        child = os.fork()
        if child == 0:
            monkeypatch.setattr(Path, "replace", replace)
            monkeypatch.setattr("shutil.rmtree", lambda *_, **__: os._exit(0))
            with staged(directory) as staging:
                (staging / "file").write_text(content)
            os._exit(0)
        os.waitpid(child, 0)
    with locked(directory):
        assert (directory / "file").read_text() == ("new" if renames == 2 else "old")
    assert [*tmp_path.iterdir()] == [directory]


def test_what_a_killed_run_left_is_cleared_but_no_file_of_others(tmp_path):
    directory = tmp_path / "run"
    write_text(directory / "args.json", "{}")
    for name in (".args.json.123", ".adapter.123/part"):
        write_text(directory / name, "half")
    for name in (".run.77/part", ".run.5.77/part", ".running/part", ".run.5.lock"):
        write_text(tmp_path / name, "")
    with locked(directory):
        assert [*directory.iterdir()] == [directory / "args.json"]
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [".run.5.77", ".run.5.lock", ".run.lock", ".running", "run"]
