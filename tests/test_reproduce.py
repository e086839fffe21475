"""The workflow of the studies: its graph, its flags, and what it keeps of a run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from osrm.commands.merge import run as merge
from osrm.commands.train import train
from osrm.config import MergeConfig, TrainConfig
from osrm.data import known_tasks
from osrm.flags import parse
from osrm.merging import METHODS
from osrm.starts import STARTS
from tests.conftest import ROOT, Forked

pytest.importorskip("snakemake")

sys.path.insert(0, str(ROOT / "reproduce"))

from collect import MATRICES, TRAINING, VECTORS, collect
from plan import SCIENCE, STUDIES, chosen_rates, runs

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
    for name in ("Snakefile", "plan.py", "questions.yaml", "studies"):
        (tmp_path / "reproduce").mkdir(exist_ok=True)
        (tmp_path / "reproduce" / name).symlink_to(ROOT / "reproduce" / name)
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


@pytest.mark.sweep
@pytest.mark.parametrize("study", HUB)
def test_the_first_node_of_a_hub_study_starts_up_to_the_weights(study, tree, monkeypatch):
    node = f".save_dir/reproduce/{study}/gaussian/42/load_model_path.json"
    found = workflow("--cores", "1", node, cwd=tree, HF_HUB_OFFLINE="1")
    assert found.returncode != 0
    log = (tree / node).with_name("train.log").read_text()
    assert "on this disk, in the cache or on the" in log and "Traceback" not in log


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
    merged = [
        flags for each in SCIENCE["questions"].values() for flags in each.get("merge", {}).values()
    ]
    asked = product((setting["methods"], setting["more_methods"]), ("", *merged))
    for methods, more in asked:
        scales = " ".join(map(str, setting["scales"]))
        words = f"--methods {methods} --search {scales} {setting['merge']} {more}"
        config = parse(MergeConfig, None, shlex.split(words))
        assert set(config.methods) <= {"all", *METHODS}
    assert set(setting["tasks"]) <= set(known_tasks("mini-16"))


def test_the_starts_of_the_studies_are_those_of_the_table():
    used = {
        parse(TrainConfig, None, shlex.split(flags)).init for flags in SCIENCE["starts"].values()
    }
    assert used == set(STARTS)


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


def test_a_fresh_clone_with_all_results_lacks_the_page_alone(tree):
    """Whichever of these files its checkout wrote first."""
    study = "embedded_smoke"
    setting = STUDIES[study]
    tuned = product(setting["starts"], setting["tune"]["rates"], setting["tune"]["seeds"])
    names = [f"{run}.{end}" for run in runs(study) for end in ("json", "parquet")]
    for name in [*names, *(f"tune/{start}/{rate}/{seed}.json" for start, rate, seed in tuned)]:
        path = tree / "reproduce/results" / study / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    chosen = tree / f"hparams/lr_{study}.json"
    chosen.touch()
    for age in (60, 0):
        os.utime(chosen, (time.time() - age,) * 2)
        found = workflow("--dry-run", "--cores", "1", study, cwd=tree)
        assert re.findall(r"^rule (\w+):", found.stdout, re.M) == ["report", study], age


def test_what_lasts_of_a_run_is_what_its_merge_and_training_said(tiny, tiny_data, tmp_path):
    config = TrainConfig(
        backbone=str(tiny["roberta"]),
        data_dir=str(tiny_data),
        output_dir=str(tmp_path / "runs"),
        tasks=["rte", "sst2"],
        init="analytical",
        rank=2,
        alpha=4,
        epochs=1,
        max_seq_len=32,
    )
    train(config)
    (listed,) = (tmp_path / "runs").glob("load_model_path-*.json")
    merged = tmp_path / "merged"
    merge(
        MergeConfig(
            load_model_path=str(listed),
            methods=["task_arithmetic"],
            search=[0.3, 1.0],
            diagnose=True,
            output_dir=str(merged),
        )
    )
    kept = tmp_path / "results" / "analytical+k1" / "42"
    kept.parent.mkdir(parents=True)
    files = [kept.with_suffix(end) for end in (".json", ".parquet")]
    code, output = Forked(tmp_path / "f", "reproduce/collect.py", listed, merged, *files).wait()
    assert code == 0, output
    found, results = (json.loads(path.read_text()) for path in (files[0], merged / "results.json"))
    interference = json.loads((merged / "interference.json").read_text())
    assert (found["run"], found["seed"], found["tasks"]) == ("analytical+k1", 42, ["rte", "sst2"])
    for ours, theirs in zip(found["rows"], results["rows"], strict=True):
        assert ours["name"] == theirs["name"] and ours["knobs"] == theirs["knobs"]
        assert ours["scores"] == pytest.approx(theirs["scores"], rel=1e-3)
    search = found["search"]["task_arithmetic"]
    assert search["best"] == results["search"]["task_arithmetic"]["best"]
    for name in ("shift", "energy_before", "overlap"):
        expected = np.array(interference[name]["overall"], float)
        assert np.allclose(np.array(found["interference"][name], float), expected, 1e-3, 0, True)
    seconds = 0.0
    for path in json.loads(listed.read_text()).values():
        seconds += json.loads((Path(path) / "metrics.json").read_text())["train_runtime"]
    assert found["training"]["seconds"] == pytest.approx(seconds, rel=1e-3)
    assert found["training"]["rank"] == 2 and found["transform"] is None
    assert found["training"]["lr"] == {"rte": config.lr, "sst2": config.lr}
    assert len(pd.read_parquet(files[1])) == sum(
        each["eval_samples"] for each in results["rows"][0]["metrics"].values()
    )


def test_a_transform_records_no_training(tmp_path):
    """Its run has --lr and --epochs like any other, and uses neither."""
    table = {"overall": 0, "modules": {}}
    flags = {"lr": 4e-4, "epochs": 10, "transform": "nullify", "load_model_path": "x.json"}
    results = {"environment": {}, "backbone": "x", "evaluation": {}, "rows": [], "search": {}}
    for name, content in {
        "results.json": results,
        "interference.json": {**dict.fromkeys((*MATRICES, *VECTORS), table), "modules": []},
        "metrics.json": {},
        "args.json": {**dict.fromkeys(TRAINING), **flags},
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
    found = collect({"rte": str(tmp_path)}, tmp_path, "gaussian+nullify", 42)
    assert found["transform"] == "nullify" and found["training"].keys() == {*TRAINING}


def test_the_rate_of_a_start_is_the_mildest_that_cannot_be_told_from_the_best(tree):
    """One standard error, pooled over starts and rates."""
    scores = {"1e-3": (0.6, 0.6), "2e-3": (0.7, 0.7), "4e-3": (0.62, 0.82)}
    clear = {"1e-3": (0.4, 0.6), "2e-3": (0.4, 0.4), "4e-3": (0.9, 0.9)}
    assert [*scores] == [*clear] == STUDIES["embedded"]["tune"]["rates"]
    for start in STUDIES["embedded"]["starts"]:
        for rate, found in (clear if start == "orthogonal" else scores).items():
            for seed, score in zip(STUDIES["embedded"]["tune"]["seeds"], found, strict=True):
                path = tree / f"reproduce/results/embedded/tune/{start}/{rate}/{seed}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(score))
    done = workflow("--cores", "1", "hparams/lr_embedded.json", cwd=tree)
    assert done.returncode == 0, done.stderr
    chosen = json.loads((tree / "hparams/lr_embedded.json").read_text())
    assert [*chosen] == STUDIES["embedded"]["starts"]
    # Of the three rates of every start one varies, by .2 between its two seeds: variance .02.
    error = np.sqrt(0.02 / 3 / 2)
    for start, found in chosen.items():
        assert found["lr"] == ("4e-3" if start == "orthogonal" else "2e-3")
        assert found["standard_error"] == pytest.approx(error)
    assert chosen["gaussian"]["tried"] == pytest.approx({"1e-3": 0.6, "2e-3": 0.7, "4e-3": 0.72})


def test_of_one_seed_the_best_rate_is_taken():
    found = chosen_rates({"gaussian": {"1e-3": [0.7], "2e-3": [0.71]}})
    assert found["gaussian"]["lr"] == "2e-3" and found["gaussian"]["standard_error"] == 0


@pytest.mark.sweep
def test_another_rate_is_a_multiple_of_the_chosen_one(tree):
    node = ".save_dir/reproduce/llama3_8b/gaussian+lr2x/42/load_model_path.json"
    done = workflow("--cores", "1", "--printshellcmds", node, cwd=tree, HF_HUB_OFFLINE="1")
    log = (tree / node).with_name("train.log").read_text()  # it starts up to the weights
    assert "on this disk, in the cache or on the" in log and "Traceback" not in log
    assert "--lr 0.0008 " in done.stderr and STUDIES["llama3_8b"]["lr"] == "4e-4"
