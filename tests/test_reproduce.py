"""The workflow of the studies: its graph, its flags, and what it keeps of a run."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from osrm.config import MergeConfig, TrainConfig, parse
from osrm.glue import TASKS
from osrm.merging import METHODS
from osrm.starts import STARTS
from tests.test_readme import ROOT

pytest.importorskip("snakemake")

STUDIES = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((ROOT / "reproduce" / "studies").glob("*.yaml"))
}
SCIENCE = yaml.safe_load((ROOT / "reproduce" / "questions.yaml").read_text())
QUESTIONS = ["methods", *SCIENCE["questions"]]
HUB = [name for name in STUDIES if "minilm" not in STUDIES[name]["flags"]]


def workflow(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    python = Path(sys.executable).parent
    path = f"{python}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "snakemake", "--snakefile", "reproduce/Snakefile", *words]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tree(tmp_path) -> Path:
    """The project without its results and runs, to run the workflow in."""
    for name in ("reproduce/Snakefile", "reproduce/questions.yaml", "reproduce/studies"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(ROOT / name)
    for name in ("osrm", "train_glue.py", "merge.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    chosen = shutil.ignore_patterns(*(f"lr_{study}.json" for study in STUDIES))
    shutil.copytree(ROOT / "hparams", tmp_path / "hparams", ignore=chosen)
    return tmp_path


@pytest.mark.parametrize("study", STUDIES)
def test_every_target_passes_a_dry_run(study, tree):
    targets = [study, *(f"{study}_{question}" for question in QUESTIONS)]
    found = workflow("--dry-run", "--cores", "2", *targets, cwd=tree)
    assert found.returncode == 0, found.stderr
    starts = STUDIES[study].get("starts", SCIENCE["starts"])
    assert (
        f"results/{study}/{starts[0] if isinstance(starts, list) else 'gaussian'}/" in found.stdout
    )


def test_the_slurm_profile_asks_for_a_gpu_a_job():
    profile = yaml.safe_load((ROOT / "reproduce/slurm/config.yaml").read_text())
    assert profile["executor"] == "slurm"
    text = (ROOT / "reproduce/Snakefile").read_text()
    assert text.count("gpu=1") == sum(
        text.count(f"rule {each}:") for each in ("tune", "train", "transform", "merge")
    )


@pytest.mark.parametrize("study", HUB)
def test_the_first_node_of_a_hub_study_starts_up_to_the_weights(study, tree, monkeypatch):
    node = f".save_dir/reproduce/{study}/gaussian/42/load_model_path.json"
    found = workflow("--cores", "1", node, cwd=tree, HF_HUB_OFFLINE="1")
    assert found.returncode != 0
    log = (tree / node).with_name("train.log").read_text()
    assert "is no local model, not cached here" in log and "Traceback" not in log


@pytest.mark.parametrize("study", STUDIES)
def test_every_flag_of_a_study_is_one_of_the_scripts(study):
    setting = STUDIES[study]
    varied = [
        flags
        for question in SCIENCE["questions"].values()
        for kind in ("vary", "transform")
        for flags in question.get(kind, {}).values()
    ]
    for start in SCIENCE["starts"].values():
        for more in ("", *varied):
            words = shlex.split(f"{setting['flags']} {setting['train']} {start} {more}")
            config = parse(TrainConfig, None, words)
            assert config.alpha / config.rank == 2
    for methods in (setting["methods"], setting["more_methods"]):
        scales = " ".join(map(str, setting["scales"]))
        words = f"--methods {methods} --search {scales} {setting['merge']}"
        config = parse(MergeConfig, None, shlex.split(words))
        assert set(config.methods) <= {"all", *METHODS}
    assert set(setting["tasks"]) <= set(TASKS)


def test_the_starts_of_the_studies_are_those_of_the_table():
    used = {
        parse(TrainConfig, None, shlex.split(flags)).init for flags in SCIENCE["starts"].values()
    }
    assert used == set(STARTS) - {"kaiming"}


def test_finished_runs_of_another_machine_are_not_run_again(tree):
    """What is committed are results; neither adapters nor what Snakemake noted came with them."""
    listed = workflow("--dry-run", "--cores", "1", "embedded_smoke_samples", cwd=tree)
    assert "rule train:" in listed.stdout and "rule tune:" in listed.stdout
    for start in STUDIES["embedded_smoke"]["starts"]:
        for end in ("json", "parquet"):
            path = tree / f"reproduce/results/embedded_smoke/{start}+k1/42.{end}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    found = workflow("--dry-run", "--cores", "1", "embedded_smoke_samples", cwd=tree)
    assert found.returncode == 0 and "rule train:" not in found.stdout
    assert "rule tune:" not in found.stdout and "rule merge:" not in found.stdout
