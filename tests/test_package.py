"""What `pip install .` installs, and what runs where a dependency is missing."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import pytest

from osrm import measure
from osrm.commands.train import train
from osrm.config import MergeConfig
from osrm.runs import run_dir
from tests.conftest import ROOT, small, written


def test_an_installation_holds_the_package_alone(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT / "osrm", source / "osrm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    install = [sys.executable, "-m", "pip", "install", *offline, "--target", target, source]
    subprocess.run(install, check=True)
    expected = {
        path.relative_to(ROOT)
        for path in (ROOT / "osrm").rglob("*")
        if path.suffix == ".py"
        or (path.parts[-2:-1] == ("embedded",) and path.suffix in (".txt", ".json"))
    }
    installed = {
        path.relative_to(target)
        for path in target.rglob("*")
        if path.is_file() and "dist-info" not in str(path) and path.suffix != ".pyc"
    }
    commands = {Path("bin/osrm-train"), Path("bin/osrm-merge")}
    assert installed == expected | commands
    for name in commands:
        help = [sys.executable, target / name, "--help"]
        shown = subprocess.run(
            help, env={"PYTHONPATH": target}, capture_output=True, text=True, check=True
        ).stdout
        assert shown.startswith(f"usage: {name.name} ") and "--backbone" in shown
    code = "import osrm; print(osrm.__file__, osrm.load_merged.__name__)"
    command = [
        sys.executable,
        "-I",
        "-c",
        f"import sys; sys.path.insert(0, {str(target)!r}); {code}",
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == f"{target}/osrm/__init__.py load_merged\n"


# -- without a package -------------------------------------------------------------------------

JOURNEYS = """
import json, sys
absent, training, merging = map(json.loads, sys.argv[1:])
sys.modules.update(dict.fromkeys(absent))
from osrm.commands.merge import run
from osrm.commands.train import train
from osrm.config import MergeConfig, TrainConfig
train(TrainConfig(**training))
run(MergeConfig(**merging))
"""


@pytest.mark.parametrize(
    ("absent", "no_eval"),
    [
        pytest.param(["datasets", "evaluate"], False, id="datasets", marks=pytest.mark.sweep),
        pytest.param(["datasets", "evaluate", "pyarrow"], True, id="pyarrow"),
    ],
)
def test_a_run_on_jsonl_needs_no_datasets(tiny, tiny_data, tmp_path, absent, no_eval):
    """The same bytes as with everything there. The predictions of a score are a parquet file."""
    here = small(tiny, tiny_data, tmp_path / "here", init="analytical", epochs=1)
    train(here)
    there = replace(here, output_dir=str(tmp_path / "there"))
    runs = {task: str(run_dir(there, task)) for task in there.tasks}
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    merging = MergeConfig(
        str(tmp_path / "runs.json"),
        methods=["average", "ties"],
        no_eval=no_eval,
        output_dir=str(tmp_path / "merged"),
    )
    words = map(json.dumps, (absent, asdict(there), asdict(merging)))
    subprocess.run(
        [sys.executable, "-c", JOURNEYS, *words],
        cwd=ROOT,
        env={**os.environ, "OSRM_CACHE": str(tmp_path / "cache")},
        check=True,
        capture_output=True,
    )
    for task, run in runs.items():
        name = "adapter_model.safetensors"
        assert Path(run, name).read_bytes() == (run_dir(here, task) / name).read_bytes()
        scores, expected = (
            json.loads((folder / "metrics.json").read_text())
            for folder in (Path(run), run_dir(here, task))
        )
        assert scores["eval_accuracy"] == expected["eval_accuracy"]
    assert written(tmp_path / "merged" / "ties")
    assert (tmp_path / "merged" / "results.json").exists() != no_eval


def test_a_missing_package_has_no_version(monkeypatch):
    monkeypatch.setattr(measure, "PACKAGES", ("numpy", "no-such-package", "torch"))
    found = measure.environment()
    assert [*found] == ["python", "numpy", "torch", "git_commit"]
    assert found["torch"] == version("torch")
