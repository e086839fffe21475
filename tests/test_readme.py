"""The README tells the truth: its commands parse, its tables are the code's, its files exist."""

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from osrm import embedded
from osrm.config import MergeConfig, TrainConfig, parse
from osrm.errors import UserError
from osrm.glue import TASKS
from osrm.merging import METHODS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def check(command: str, monkeypatch, tmp_path) -> None:
    """Parse one command without running it."""
    program, *words = shlex.split(command)
    if program == "make":
        subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)
        return
    if program == "snakemake":
        pytest.importorskip("snakemake")
        subprocess.run(
            [sys.executable, "-m", "snakemake", *words, "--dry-run", "--directory", str(tmp_path)],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        return
    if program == "pip":
        assert words == ["install", ".[reproduce]"]
        return
    if program in ("torchrun", "accelerate"):
        parser = get_args_parser() if program == "torchrun" else launch_command_parser()
        found = parser.parse_args(words[program == "accelerate" :])
        if program == "accelerate":
            assert load_config_from_file(str(ROOT / found.config_file)).fsdp_config
        program, words = "python", [found.training_script, *found.training_script_args]
    assert program in ("python", "python3")
    script, *arguments = words
    if script == "train_glue.py":
        parse(TrainConfig, None, arguments)
    elif script == "merge.py":
        parse(MergeConfig, None, arguments)
    elif script.startswith(("benchmarks/", "reproduce/")):
        found = subprocess.run(
            [sys.executable, script, *arguments, "--help"],
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        assert found.returncode == 0, found.stderr
    else:
        assert words[:2] == ["-m", "osrm.report"]
        from osrm import report

        monkeypatch.setattr("sys.argv", ["report", *words[2:]])
        report.read_arguments()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch, tmp_path):
    check(command, monkeypatch, tmp_path)


@pytest.mark.parametrize("command", [each for each in COMMANDS if "python3" in each])
def test_the_releases_commands_start(command, monkeypatch, tmp_path):
    """They run to the point where weights, or checkpoints, are needed, and say what is missing."""
    import huggingface_hub.constants

    from osrm.commands.train import train

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config = parse(TrainConfig, None, shlex.split(command)[2:])
    lacking = "train it first" if config.load_model_path else f"--backbone {config.backbone}"
    with pytest.raises(UserError, match=lacking):
        train(replace(config, output_dir=str(tmp_path)))


@pytest.mark.parametrize(
    "command",
    [
        "python train_glue.py --no-such-flag",
        "python merge.py --methods",
        "python -m osrm.report x.json",
        "python train_glue.py --init sideways",
    ],
)
def test_a_command_that_is_wrong_would_be_noticed(command, monkeypatch, tmp_path):
    with pytest.raises(SystemExit):
        check(command, monkeypatch, tmp_path)


def test_the_commands_of_the_release_and_of_the_makefile_are_there():
    assert {"make demo", "make test"} <= {*COMMANDS}
    assert sum("python3 train_glue.py" in command for command in COMMANDS) == 8
    recipe = subprocess.run(
        ["make", "--dry-run", "demo"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    lines = [
        line
        for line in recipe.replace("\\\n", " ").splitlines()
        if line.startswith((".venv/bin/python train_glue.py", ".venv/bin/python merge.py"))
    ]
    assert len(lines) == 4  # two starts, trained and merged
    for line in lines:
        _, script, *arguments = shlex.split(line)
        parse(TrainConfig if script == "train_glue.py" else MergeConfig, None, arguments)


def test_the_corpora_are_those_of_the_code():
    for task, source in embedded.SOURCES.items():
        assert f"| {task} | {source.origin} | {source.licence} |" in README


def test_the_plug_in_example_runs():
    """On the real embedded model: orthonormal rows of A, and B still zero."""
    (example,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        if "initialize_lora_osrm_weights" in block
    )
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    layers = [each for each in names["model"].modules() if hasattr(each, "lora_A")]
    assert len(layers) == 12
    for layer in layers:
        A = layer.lora_A["default"].weight
        torch.testing.assert_close(A @ A.T, torch.eye(8), rtol=0, atol=1e-5)
        assert not layer.lora_B["default"].weight.any()


def test_the_tree_is_the_tree():
    block = re.search(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)[1]
    folder = ROOT
    for line in block.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT
        path = folder / name
        assert path.exists(), name
        if name == "osrm/":
            folder = path
    shown = {line.split()[0].strip("/") for line in block.splitlines() if line.startswith(" ")}
    there = {path.name for path in (ROOT / "osrm").iterdir() if not path.name.startswith("_")}
    assert there - {"errors.py"} == shown


def test_methods_and_tasks_are_named():
    assert all(name in README.lower() for name in (*METHODS, *TASKS))


def test_environment_yml_is_in_step_with_pyproject():
    text = (ROOT / "pyproject.toml").read_text()
    required = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "trft"
    conda, (pip,) = environment["dependencies"][:-1], environment["dependencies"][-1].values()
    assert pip == re.findall(r'"(.*?)"', required)
    python = re.search(r'requires-python = "(.*?)"', text)[1]
    assert conda == [f"python{python}", "pip"]
