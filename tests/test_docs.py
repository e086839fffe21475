"""README and manual tell the truth: commands parse, snippets run, tables and links are right."""

import json
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
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch.distributed.run import get_args_parser
from transformers import AutoModelForSequenceClassification

from osrm import embedded
from osrm.commands.merge import run
from osrm.config import MergeConfig, TrainConfig
from osrm.errors import UserError
from osrm.flags import parse
from osrm.glue import TASKS
from osrm.merging import METHODS
from osrm.starts import STARTS
from tests.conftest import ROOT, Forked

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
README = PAGES["README.md"]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page; those in lists are indented."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)


COMMANDS = {  # each once, with the page that has it first
    line.strip(): page
    for page, text in reversed(PAGES.items())
    for block in blocks(text, "bash")
    for line in block.splitlines()
    if line.strip()
}
SNIPPETS = [(page, code) for page, text in PAGES.items() for code in blocks(text, "python")]


def check(command: str, monkeypatch, tmp_path) -> None:
    """Parse one command without running it."""
    program, *words = shlex.split(re.sub(r"^([A-Z_]+=\S+ )+", "", command))  # the environment
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
        lowest = ["install", "--editable", ".[dev]", "--constraint", "tests/lowest.txt"]
        assert words in (["install", ".[reproduce]"], lowest)
        return
    if program == "vllm":  # not installed here: the flags that its documentation has
        flags = {word for word in words if word.startswith("--")}
        assert words[0] == "serve" and not words[1].startswith("-")
        assert flags <= {"--enable-lora", "--max-lora-rank", "--lora-modules", "--runner"}
        return
    if program in ("torchrun", "accelerate"):
        parser = get_args_parser() if program == "torchrun" else launch_command_parser()
        parsed = parser.parse_args(words[program == "accelerate" :])
        if program == "accelerate":
            assert load_config_from_file(str(ROOT / parsed.config_file)).fsdp_config
        program, words = "python", [parsed.training_script, *parsed.training_script_args]
    assert program in ("python", "python3")
    script, *arguments = words
    if script == "train_glue.py":
        parse(TrainConfig, None, arguments)
    elif script == "merge.py":
        parse(MergeConfig, None, arguments)
    elif script.startswith(("benchmarks/", "reproduce/")):
        code, output = Forked(tmp_path / "printed", script, *arguments, "--help").wait()
        assert code == 0, output
    elif words[:2] == ["-m", "pytest"]:
        assert words[2:] == ["-m", "gpu"]
    else:
        assert words[:2] == ["-m", "osrm.report"]
        from osrm import report

        monkeypatch.setattr("sys.argv", ["report", *words[2:]])
        report.read_arguments()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch, tmp_path):
    check(command, monkeypatch, tmp_path)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "python3" in command])
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


def test_the_readme_is_one_screen():
    lines = README.splitlines()
    assert len(lines) <= 160
    assert len(README.split()) <= 1500
    assert lines.index("```bash") < 25


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", head).strip().lower().replace(" ", "-") for head in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_of_the_manual_is_in_its_menu():
    menu = [
        path
        for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
        for path in entry.values()
    ]
    assert sorted(f"docs/{path}" for path in menu) == [p for p in PAGES if p.startswith("docs/")]


def test_the_differences_from_the_release_are_numbered_and_linked():
    parts = re.split(r"^(\d+)\. ", PAGES["docs/release-differences.md"], flags=re.MULTILINE)
    assert [*map(int, parts[1::2])] == [*range(1, 20)]
    for part in parts[2::2]:
        assert "](../osrm/" in part
        assert "](https://github.com/illidanlab/OSRM/blob/bfe8b6d/" in part


def test_the_corpora_are_those_of_the_code():
    for task, source in (embedded.SOURCES | embedded.NINE).items():
        assert f"| {task} | {source.origin} | {source.licence} |" in PAGES["docs/data.md"]


def test_methods_starts_and_tasks_are_named():
    for name in METHODS:
        assert name in README and re.search(rf"^\|.*\b{name}\b", PAGES["docs/merge.md"], re.M)
    for name in STARTS:
        assert f"`{name}`" in README and f"| {name} |" in PAGES["docs/train.md"]
    assert all(name in PAGES["docs/data.md"] for name in TASKS)


@pytest.fixture(scope="module")
def workplace(tiny, tmp_path_factory) -> Path:
    """A folder that has what the snippets name: two adapters, a run directory, a merge."""
    folder = tmp_path_factory.mktemp("workplace")
    run_directory = re.search(r'"(\.save_dir/sst2/.*?)"', PAGES["docs/train.md"])[1]
    names = ["path/of/an/adapter", "path/of/another", run_directory]
    for seed, name in enumerate(names):
        base = AutoModelForSequenceClassification.from_pretrained(tiny["roberta"], num_labels=2)
        lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
        model = get_peft_model(base, lora)
        torch.manual_seed(seed)
        for layer in model.modules():
            if hasattr(layer, "lora_B"):
                torch.nn.init.normal_(layer.lora_B["default"].weight)
        model.save_pretrained(folder / name)
    table = {task: str(folder / name) for task, name in zip(("rte", "sst2"), names)}
    (folder / "table.json").write_text(json.dumps(table))
    config = MergeConfig(
        load_model_path=str(folder / "table.json"),
        methods=["ties"],
        no_eval=True,
        output_dir=str(folder / ".save_dir" / "merged"),
    )
    run(config)
    return folder


@pytest.mark.parametrize(
    "page, code", SNIPPETS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(SNIPPETS)]
)
def test_every_snippet_runs(page, code, workplace, tiny, monkeypatch):
    monkeypatch.chdir(workplace)
    names: dict = {}
    if "other_loader" in code:  # the reader's own
        base = AutoModelForSequenceClassification.from_pretrained(tiny["roberta"])
        ids = [{"input_ids": torch.randint(4, 20, (4, 8))} for _ in range(2)]
        names |= {"loader": ids[:1], "other_loader": ids[1:]}
        lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
        names["peft_model"] = get_peft_model(base, lora)
    exec(compile(code, page, "exec"), names)
    if "initialize_lora_osrm_weights" in code:
        adapted = names.get("peft_model") or names["model"]
        layers = [layer for layer in adapted.modules() if hasattr(layer, "lora_A")]
        assert layers
        for layer in layers:  # orthonormal rows of A, and B still zero
            A = layer.lora_A["default"].weight
            torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-5)
            assert not layer.lora_B["default"].weight.any()
    elif "for module in merged" in code:
        torch.testing.assert_close(names["mine"], names["theirs"])
    else:
        assert names["model"].config.num_labels == 2


def test_the_readmes_tree_is_the_tree():
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)[1]
    for line in tree.splitlines():
        for name in re.split(r"  +", line)[0].split(", "):
            assert (ROOT / name).exists(), name


def test_the_map_is_the_tree():
    text = PAGES["docs/architecture.md"]
    lines = re.search(r"## The map\n.*?```\n(.*?)```", text, re.DOTALL)[1].splitlines()
    folder = ROOT
    for line in lines:
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT
        assert (folder / name).exists(), name
        if name == "osrm/":
            folder = ROOT / name
    shown = {line.split()[0].strip("/") for line in lines if line.startswith(" ")}
    there = {path.name for path in (ROOT / "osrm").iterdir() if not path.name.startswith("_")}
    assert there == shown


def required() -> list[str]:
    """The packages of pyproject.toml, with their bounds."""
    text = (ROOT / "pyproject.toml").read_text()
    return re.findall(r'"(.*?)"', re.search(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)[1])


def test_environment_yml_is_in_step_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "trft"
    conda, (pip,) = environment["dependencies"][:-1], environment["dependencies"][-1].values()
    assert pip == required()
    python = re.search(r'requires-python = "(.*?)"', (ROOT / "pyproject.toml").read_text())[1]
    assert conda == [f"python{python}", "pip"]


def test_the_tested_versions_are_those_of_the_bounds():
    row = r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$"
    tested = re.findall(row, PAGES["CONTRIBUTING.md"], re.MULTILINE)
    pinned = (ROOT / "tests/lowest.txt").read_text().splitlines()
    assert len(tested) == len(required())
    for each, (name, lowest, newest) in zip(required(), tested):
        package, lower, upper = re.fullmatch(r"(\w+)>=([\d.]+),<([\d.]+)", each).groups()
        assert package == name and f"{name}=={lowest}" in pinned
        assert Version(lower) == Version(lowest) <= Version(newest) < Version(upper)
