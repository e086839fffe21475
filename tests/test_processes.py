"""Several processes on the CPU (gloo) do what one does, however they are started."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from osrm.bank import read_bank
from osrm.commands.train import train
from osrm.config import TrainConfig
from osrm.runs import run_dir
from tests.conftest import ROOT, Forked, make_tiny, small, write_data

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    "fsdp": [
        *("accelerate.commands.launch", "--config_file", "hparams/fsdp.yaml"),
        *("--num_processes", "2", "tests/fsdp_on_cpu.py"),
    ],
}
FLAGS = (
    "--tasks rte sst2 --rank 2 --alpha 4 --lr 1e-2 --init analytical --per-device-eval-bsz 10"
    " --per-device-train-bsz 8"
)


@pytest.fixture(scope="module")
def still(tmp_path_factory) -> dict[str, Path]:
    """Tiny models without dropout, whose random numbers each process has of its own."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {
        family: make_tiny(family, tmp_path_factory.mktemp(family) / f"tiny-{family}", **off)
        for family in ("roberta", "llama")
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """144 training examples: nine steps of sixteen, of which two processes have eight each."""
    folder = tmp_path_factory.mktemp("data")
    return write_data(folder, ["rte", "sst2", "stsb"], train=160, validation=25)


class Launched:
    """Two processes of a script under a launcher, as `Forked` has them."""

    def __init__(self, launcher: str, folder: Path, script: Path | str, *arguments: object) -> None:
        folder.mkdir()
        self.output = folder / "output.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *LAUNCHERS[launcher], str(script), *map(str, arguments)],
                cwd=ROOT,
                env={**os.environ, "OSRM_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.send_signal = self.process.send_signal

    def wait(self) -> tuple[int, str]:
        return self.process.wait(900), self.output.read_text(errors="replace")

    def alive(self) -> bool:
        return self.process.poll() is None


def start(launcher: str, folder: Path, script: Path | str, *arguments: object) -> Forked | Launched:
    """Two processes, of torch's or accelerate's launcher, or forked, which is faster."""
    environ = {"OSRM_CACHE": str(folder / "cache")}
    if launcher == "forked":
        return Forked(folder, script, *arguments, count=2, **environ)
    if launcher == "forked fsdp":
        environ |= fsdp_environ()
        return Forked(folder, "tests/fsdp_on_cpu.py", script, *arguments, count=2, **environ)
    return Launched(launcher, folder, script, *arguments)


def fsdp_environ() -> dict[str, str]:
    """What accelerate's launcher tells its processes of hparams/fsdp.yaml."""
    words = ["--config_file", str(ROOT / "hparams/fsdp.yaml"), "--num_processes", "2", "script"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    told = prepare_multi_gpu_env(arguments)
    return {name: text for name, text in told.items() if name.startswith(("ACCELERATE", "FSDP"))}


def flags(backbone: Path, data: Path, out: Path) -> list[str]:
    return [*FLAGS.split(), "--backbone", backbone, "--data-dir", data, "--output-dir", out]


@pytest.fixture(scope="module")
def banks(still, data, tmp_path_factory) -> dict[str, Path]:
    """{family: the feature bank that one process fills}"""
    folder = tmp_path_factory.mktemp("banks")
    banks = {family: folder / family for family in still}
    for family, bank in banks.items():
        train(small(still, data, folder, family, only_features=True, feature_bank=str(bank)))
    return banks


@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_two_processes_find_the_features_of_one(family, still, data, banks, tmp_path):
    two = tmp_path / "two"
    more = [*flags(still[family], data, tmp_path), "--only-features", "--feature-bank", two]
    code, output = start("forked", tmp_path / "started", "train_glue.py", *more).wait()
    assert code == 0, output
    files = [read_bank(path) for path in (banks[family], two)]
    assert files[0].keys() == files[1].keys() == {"rte", "sst2", "stsb"}
    for task, file in files[0].items():
        for module, moment in file.items():
            own, other = moment.gram, files[1][task][module].gram
            assert (own - other).norm() < 1e-5 * own.norm()


sharding = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="FSDP on the CPU fails in torch 2.6; 2.7 to 2.12: untested"
)


@pytest.mark.parametrize(
    "launcher, family",
    [
        ("torchrun", "roberta"),
        pytest.param("forked fsdp", "llama", marks=sharding),
        pytest.param("fsdp", "llama", marks=[sharding, pytest.mark.sweep]),
        pytest.param("accelerate", "llama", marks=pytest.mark.sweep),
    ],
)
def test_two_processes_train_as_one(launcher, family, still, data, banks, tmp_path):
    """The same steps and scores; adapters up to what Adam makes of rounding."""
    bank = str(banks[family])  # or rounding would choose A in a null space
    settings = {"init": "analytical", "per_device_train_bsz": 16, "feature_bank": bank}
    settings["shift_penalty"] = 0.0 if "fsdp" in launcher else 0.1
    one = small(still, data, tmp_path / "one", family, **settings)
    train(one)
    more = [*flags(still[family], data, tmp_path / "two"), "--epochs", 2, "--feature-bank", bank]
    more += ["--shift-penalty", settings["shift_penalty"]]
    code, output = start(launcher, tmp_path / "started", "train_glue.py", *more).wait()
    assert code == 0, output
    assert output.count("merge them with") == 1  # one process reports
    assert_as_one(one, small(still, data, tmp_path / "two", family, **settings))


@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_two_accumulated_batches_are_as_one(family, still, data, tmp_path):
    one = small(still, data, tmp_path / "one", family, shift_penalty=0.1)
    halves = {"per_device_train_bsz": 8, "grad_accumlate_steps": 2}
    two = small(still, data, tmp_path / "two", family, shift_penalty=0.1, **halves)
    for config in (one, two):
        train(config)
    assert_as_one(one, two)


def assert_as_one(one: TrainConfig, two: TrainConfig) -> None:
    """The runs have the same files, steps and scores, and nearly the same adapters."""
    for task in ("rte", "sst2"):
        runs = [run_dir(each, task) for each in (one, two)]
        begun, *ended = (
            load_file(at / "adapter_model.safetensors") for at in (runs[0] / "init_model", *runs)
        )
        assert begun.keys() == ended[0].keys() == ended[1].keys()
        assert distance(*ended) < 0.05 * distance(begun, ended[0])
        scores = [json.loads((at / "metrics.json").read_text()) for at in runs]
        for name in ("eval_accuracy", "eval_samples", "train_samples", "selection_accuracy"):
            assert scores[0][name] == scores[1][name]
        logs = [json.loads((at / "trainer_state.json").read_text())["log_history"] for at in runs]
        for own, other in zip(*logs, strict=True):
            for name in own.keys() & {"loss", "grad_norm", "eval_accuracy"}:
                assert own[name] == pytest.approx(other[name], rel=1e-2)
        files = [sorted(path.name for path in at.iterdir()) for at in runs]
        assert files[0] == files[1]


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return sum(float((first[name] - second[name]).square().sum()) for name in first) ** 0.5


FAILING = """
import os, runpy, sys
from osrm import training

if os.environ["RANK"] == "1":
    def fail(*_, **__):
        raise RuntimeError("rank 1 is broken")
    training.TaskTrainer.training_step = fail
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


either = pytest.mark.parametrize(
    "launcher", ["forked", pytest.param("torchrun", marks=pytest.mark.sweep)]
)


@either
def test_a_failing_process_fails_the_job(launcher, still, data, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    more = ["train_glue.py", *flags(still["llama"], data, tmp_path / "out")]
    code, output = start(launcher, tmp_path / "started", script, *more).wait()
    assert code != 0 and "rank 1 is broken" in output
    assert not [*tmp_path.rglob("metrics.json")]


@either
def test_a_signal_to_the_launcher_leaves_a_checkpoint_of_all(launcher, still, data, tmp_path):
    """The newest one, and whole."""
    out = tmp_path / "out"
    more = [*flags(still["llama"], data, out), "--epochs", 500]
    started = start(launcher, tmp_path / "started", "train_glue.py", *more)
    while not [*out.glob("rte/*/checkpoints/checkpoint-*/trainer_state.json")]:
        assert started.alive(), started.wait()
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    _, output = started.wait()
    assert "stopped by SIGTERM; --resume goes on from step" in output
    (checkpoints,) = out.glob("rte/*/checkpoints")
    assert not (checkpoints / "unfinished").exists()
    steps = [int(path.name.removeprefix("checkpoint-")) for path in checkpoints.iterdir()]
    assert f"from step {max(steps)}\n" in output
