"""Tiny random models and tiny data; real ones come from the cache of the embedded set."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub's client
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

# Every shape that these files' annotations promise is checked in the tests.
NUMBERS = (
    "moments",
    "subspace",
    "starts",
    "merging",
    "task_vectors",
    "features",
    "adapters",
    "interference",
)
install_import_hook([f"osrm.{name}" for name in NUMBERS], "beartype.beartype")

import json
import logging
import random
import re
import runpy
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from osrm.errors import run_script
from osrm.glue import TASKS

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)

TEXT = "a the no is was not good bad dog cat runs sleeps sees film very old new man woman"
WORDS = TEXT.split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
COMMON = {
    "vocab_size": len(WORDS) + len(SPECIAL),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
}
CONFIGS = {
    "roberta": RobertaConfig(**COMMON, **BERT_LIKE),
    "bert": BertConfig(**COMMON, **BERT_LIKE),
    "mpnet": MPNetConfig(**COMMON, **BERT_LIKE),
    "distilbert": DistilBertConfig(
        **COMMON, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=66
    ),
    "t5": T5Config(
        **COMMON, d_model=32, d_kv=16, num_layers=2, num_heads=2, d_ff=64, decoder_start_token_id=0
    ),
    "llama": LlamaConfig(
        **{**COMMON, "pad_token_id": None},
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
    ),
}


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Words to ids; with an end token as each family has it; Llama's has no padding token."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single, pair = {
        "t5": ("$A </s>", "$A </s> $B </s>"),
        "llama": ("<s> $A", "<s> $A $B"),
    }.get(family, ("<s> $A </s>", "<s> $A </s> </s> $B </s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    padding = {} if family == "llama" else {"pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        **padding,
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """{family: directory of a tiny random pre-trained body with its tokenizer}."""
    return {
        family: make_tiny(family, tmp_path_factory.mktemp(family) / f"tiny-{family}")
        for family in CONFIGS
    }


def make_tiny(family: str, directory: Path, **options: object) -> Path:
    """A tiny random pre-trained body with its tokenizer; `options` of its config."""
    torch.manual_seed(0)
    config = type(CONFIGS[family])(**CONFIGS[family].to_dict() | options)
    AutoModel.from_config(config).save_pretrained(directory)
    make_tokenizer(family).save_pretrained(directory)
    return directory


def make_examples(task: str, count: int, seed: int) -> list[dict]:
    """Examples with GLUE's columns; the label is whether "good" occurs, so it can be learnt."""
    generator = random.Random(f"{task}/{seed}")
    row = TASKS[task]
    examples = []
    for idx in range(count):
        texts = [" ".join(generator.choices(WORDS, k=generator.randint(2, 8))) for _ in row.fields]
        good = any("good" in text.split() for text in texts)
        label = int(good) if row.labels else 5.0 * good
        examples.append({**dict(zip(row.fields, texts)), "label": label, "idx": idx})
    return examples


def write_data(folder: Path, tasks: list[str], **splits: int) -> Path:
    """A --data-dir of made-up examples: {split: how many}."""
    for task in tasks:
        (folder / task).mkdir(parents=True)
        for split, count in splits.items():
            lines = [json.dumps(each) for each in make_examples(task, count, seed=len(split))]
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A --data-dir with three small tasks."""
    folder = tmp_path_factory.mktemp("data")
    return write_data(folder, ["rte", "sst2", "stsb"], train=60, validation=24)


@pytest.fixture(autouse=True)
def own_feature_cache(request, monkeypatch, tmp_path_factory):
    """Features are cached in a fresh place; the embedded model and data stay where they are."""
    from osrm import features

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(features, "cache_dir", lambda: folder)
    return folder


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    """All files and directories below, and what is in them."""
    return {
        path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


def no_forward(*_: object) -> None:
    raise AssertionError("bad input was found only after a model had begun to work")


@pytest.fixture
def refuse(tmp_path, monkeypatch, capfd, request):
    """`refuse(script, argv, words)`: run it in `tmp_path`; it must refuse, as the title says."""

    verbosity = transformers.logging.get_verbosity()

    def refuse(script: str, argv: list[str], words: list[str]) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *argv])
        monkeypatch.setattr(torch.nn.Linear, "forward", no_forward)
        # As the script itself asks for, but here transformers has been imported long ago.
        request.addfinalizer(partial(transformers.logging.set_verbosity, verbosity))
        transformers.logging.set_verbosity_error()
        # Progress goes to stderr as it does outside of pytest, which has handlers of its own.
        monkeypatch.setattr(logging.root, "handlers", [])
        before = snapshot(tmp_path)
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            warnings.simplefilter("ignore", DeprecationWarning)
            code = run_script(runpy.run_path(str(ROOT / script))["main"])
        out, err = capfd.readouterr()
        err = re.sub(r"\rLoading weights: [^\r\n]*", "", err).lstrip()
        assert code == 2, err
        assert len(err.splitlines()) == 1, err
        assert not warned, [str(each.message) for each in warned]
        assert err.startswith(f"{script}: error: "), err
        missing = [word for word in words if word not in err]
        assert not missing, f"{missing} not in: {err}"
        assert out == "" and "Traceback" not in err
        assert snapshot(tmp_path) == before, "it wrote something"

    return refuse
