"""Whatever a user hands over is read, or refused in one line: files and flags by hypothesis.

Every run draws the same cases. `FUZZ=20 python -m pytest -m "" tests/test_fuzz.py` draws 20 times
as many, at random; what fails is printed, as small as hypothesis can make it. One case of each
class of damage is also in test_malformed.py and test_bad_input.py.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import runpy
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osrm import session
from osrm.adapters import CONFIG, WEIGHTS, add_lora, save_adapter
from osrm.backbones import (
    body_fingerprint,
    find_backbone,
    head_tensors,
    load_model,
    load_tokenizer,
    projections,
)
from osrm.bank import FeatureFile, check_comparable, read_bank
from osrm.checkpoints import DENSE, INDEX, check_fits, read_checkpoint
from osrm.commands import inputs as reading
from osrm.commands import merge as merging
from osrm.commands import plan as planning
from osrm.commands import scoring
from osrm.commands import train as training
from osrm.config import MergeConfig, TrainConfig
from osrm.data import fingerprint, load_task, split_task, tokenize
from osrm.errors import explained, run_script
from osrm.flags import parse
from osrm.glue import TASKS
from osrm.merged import MergedUpdate
from osrm.merging import METHODS, merge
from osrm.moments import Moment
from osrm.records import RECIPE
from osrm.runs import args_record, write_args
from osrm.task_vectors import TaskVectors
from osrm.tensor_file import TensorFile, cached
from tests.conftest import ROOT, no_forward

pytestmark = pytest.mark.sweep
FUZZ = int(os.environ.get("FUZZ", "0"))
CASES: list[int] = []
settings.register_profile(
    "fuzz",
    derandomize=not FUZZ,
    database=None,
    deadline=timedelta(seconds=10),  # a hang, not a machine that has other work
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def cases(count: int, kinds: int = 1) -> settings:
    """So many cases of one test, of each of its kinds, or FUZZ times as many."""
    CASES.append(count * kinds)
    return settings(settings.get_profile("fuzz"), max_examples=count * max(FUZZ, 1))


# -- what is drawn -----------------------------------------------------------------------------

NAMES = ["", ".", "..", "../x", "../../../x", "/x", "a/b", "a\0b", "a\nb", "\ud800", "\udcff"]
NAMES += ["é", "x" * 300, "*", "rte", "sst2", "bias", "DEEP"]
NUMBERS = [0, -1, 1, 2, 2**63, 10**400, -(10**400), 1e300, float("nan"), float("inf")]
names = st.sampled_from(NAMES) | st.text(st.characters(), max_size=8)
numbers = st.sampled_from(NUMBERS) | st.integers() | st.floats()
scalars = st.none() | st.booleans() | numbers | names
values = (
    st.just("DEEP")
    | scalars
    | st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
        max_leaves=5,
    )
)


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """`value`, one place in it changed, dropped, added or renamed."""
    if not isinstance(value, dict | list) or not value or not draw(st.integers(0, 8)):
        alike = numbers if type(value) in (int, float) else names if type(value) is str else values
        return draw(alike if draw(st.integers(0, 2)) else values)
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    place = draw(st.integers(0, len(items) - 1))
    key, old = items[place]
    match draw(st.sampled_from(["change", "change", "change", "drop", "add", "rename"])):
        case "change":
            items[place] = key, draw(mutated(old))
        case "drop":
            del items[place]
        case "add":
            items.append((draw(names), draw(values)))
        case "rename":
            items[place] = draw(names), old
    return dict(items) if isinstance(value, dict) else [each for _, each in items]


@st.composite
def mutants(draw: st.DrawFn, value: Any) -> Any:
    """`value` with one place changed, or more, or none."""
    for _ in range(draw(st.sampled_from([1, 1, 1, 0, 2, 3]))):
        value = draw(mutated(value))
    return value


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content`, mostly as it is; else cut, or with foreign bytes in it."""
    if draw(st.integers(0, 9)):
        return content
    place = draw(st.integers(0, len(content)))
    before, after = content[:place], content[place:]
    other = st.sampled_from(
        [
            before,
            content + content,
            b"\xef\xbb\xbf" + content,
            content.decode("latin-1").encode("utf-16"),
            before + b"\xff" + after,
            before + b"\0" + after[1:],
        ]
    )
    return draw(other | st.binary(max_size=8).map(lambda some: before + some + after[len(some) :]))


def encoded(draw: st.DrawFn, value: Any) -> bytes:
    """JSON of one line; in place of the text "DEEP" many brackets."""
    text = json.dumps(value, ensure_ascii=draw(st.booleans()))
    depth = draw(st.sampled_from([10, 800, 900, 950, 1000, 100_000]))
    return text.replace('"DEEP"', "[" * depth + "]" * depth, 1).encode("utf-8", "surrogatepass")


@st.composite
def json_files(draw: st.DrawFn, good: Path) -> bytes:
    """A JSON file: some value, or a good one with changes; its bytes perhaps damaged."""
    value = draw(values if not draw(st.integers(0, 9)) else mutants(json.loads(good.read_text())))
    return draw(damaged(encoded(draw, value)))


DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool]
DTYPES += [torch.float8_e4m3fn, torch.complex64, torch.uint16]
CHANGES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    *(partial(torch.Tensor.to, dtype=dtype) for dtype in DTYPES),
    torch.Tensor.flatten,
    lambda tensor: (tensor.mT if tensor.ndim > 1 else tensor[::2]).contiguous(),
    lambda tensor: tensor[:0],
    lambda tensor: tensor[:1],
    lambda tensor: tensor[None],
    lambda tensor: tensor.new_tensor(1.0),
    lambda tensor: torch.cat([tensor, tensor]),
    *(lambda tensor, v=v: torch.full_like(tensor, v) for v in (float("nan"), 3e38, -1e-45)),
]


@st.composite
def tensor_files(draw: st.DrawFn, good: Path) -> bytes:
    """A safetensors file: its header's JSON changed, or its tensors; its bytes perhaps damaged."""
    header, content = split(good)
    if not draw(st.integers(0, 2)):
        text = encoded(draw, draw(mutants(header)))
        return draw(damaged(struct.pack("<Q", len(text)) + text + content))
    tensors = load(good)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from([*tensors] or [""]))
        tensor = tensors.pop(name, torch.ones(2))
        match draw(st.sampled_from(["change", "change", "drop", "add", "rename", "part"])):
            case "change":
                tensors[name] = draw(st.sampled_from(CHANGES))(tensor)
            case "add":
                tensors |= {name: tensor, draw(tensor_names): tensor.clone()}
            case "rename":
                tensors[draw(tensor_names)] = tensor
            case "part":
                parts = name.split(".")
                parts[draw(st.integers(0, len(parts) - 1))] = draw(tensor_names)
                tensors[".".join(parts)] = tensor
    return draw(damaged(safetensors.torch.save(tensors, header.get("__metadata__"))))


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its data."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def load(file: Path) -> dict[str, torch.Tensor]:
    """Its tensors, in the same order at every call."""
    return dict(sorted(safetensors.torch.load_file(file).items()))


def is_utf8(name: str) -> bool:
    return name == name.encode("utf-8", "replace").decode()


tensor_names = names.filter(is_utf8)

# -- a place and the property ------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tiny, tiny_data, tmp_path_factory) -> Iterator[Path]:
    """All that is watched; the working directory lies deep in it, so that ../x is seen, too."""
    root = tmp_path_factory.mktemp("root")
    (root / "a" / "b" / "here").mkdir(parents=True)
    (root / "good").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "good")
        shutil.copytree(tiny["roberta"], root / "backbone")
        shutil.copytree(tiny_data, root / "data")
        for name in ("backbone", "data"):  # only ever read: not copied for each case
            Path(name).symlink_to(root / name)
        make_good()
        patch.chdir(root / "a" / "b" / "here")
        patch.setattr(torch.nn.Linear, "forward", no_forward)
        fresh(root)
        yield root


def make_good() -> None:
    """A good file of each kind, in the working directory."""
    loaded = load_task(TASKS["rte"], "data")
    DatasetDict({k: Dataset.from_pandas(v) for k, v in loaded.items()}).save_to_disk("disk/rte")
    shutil.copy(ROOT / "hparams/merge.json", "hparams.json")
    write("epochs.json", {"rte": 1, "sst2": 2})
    write("lrs.json", {"rte": 1e-3, "sst2": 1})
    model = base()
    modules = projections(model, "qv", 2)
    torch.manual_seed(0)
    weight = model.get_submodule(modules[0]).weight
    original = weight.detach().clone()
    weight.data += 1
    model.save_pretrained("dense")
    model.save_pretrained("shards", max_shard_size="20KB")
    weight.data = original
    adapted = add_lora(base.__wrapped__(), modules, rank=2, alpha=4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    save_adapter(adapted, Path("run"))
    own = {
        "base_model": "backbone",
        "num_labels": 2,
        "body_fingerprint": body_fingerprint(model),
        "data": {"selection": {"fingerprint": fingerprint(split_task(loaded, 42).selection)}},
    }
    write("run/args.json", args_record(TRAIN, "rte", **own))
    write("models.json", {"rte": "run"})
    shared = {"features": "token", "count_padding": False}
    shared["body_fingerprint"] = own["body_fingerprint"]
    totals = {name: Moment.of(torch.randn(40, 32)) for name in modules[::2]}
    leaders = {name: modules[i - i % 2] for i, name in enumerate(modules)}
    FeatureFile.save(Path("bank/ninth.safetensors"), {**shared, "task": "ninth"}, totals, leaders)
    fisher = {name: torch.rand(32, 32) for name in modules}
    TensorFile.save(Path("fisher.safetensors"), fisher, {"settings": {**shared, "what": "fisher"}})
    config = MergeConfig("models.json", hparams="hparams.json", methods=["ties"], no_eval=True)
    merging.run(dataclasses.replace(config, output_dir="merged"))
    Path("merged/ties", RECIPE).replace("recipe.json")
    shutil.rmtree("merged")


TRAIN = TrainConfig(backbone="backbone", tasks=["rte", "sst2"], data_dir="data", rank=2)
MERGE = MergeConfig("models.json", hparams="hparams.json")


def write(path: str, value: object) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(json.dumps(value))


@cache
def base() -> Any:
    backbone = find_backbone("backbone")
    labels = TASKS["rte"].labels
    return load_model(backbone, labels, load_tokenizer(backbone), torch.float32)


def fresh(root: Path, *changes: tuple[str, bytes]) -> None:
    """The working directory as at the beginning, but for these files."""
    here = Path.cwd()
    for path in here.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.copytree(root / "good", here, symlinks=True, dirs_exist_ok=True)
    for path, content in changes:
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_bytes(content)


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    """All that is in a folder: of files when they were written, and their sizes."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()  # a directory is as before when a lock has come and gone
        found[path] = (0, 0) if path.is_dir() else (about.st_mtime_ns, about.st_size)
    return found


def outcome(act: Callable[[], object], root: Path, *named: str, written: str = "") -> str:
    """Nothing if `act` goes well, else its one line, which has one of `named` in it.

    Whatever else it raises goes through. It writes nothing but the directory `written`.
    """
    before = listing(root)
    message = ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            act()
        except Exception as error:
            message = str(explained(error) or "")
            if not message:
                raise
            assert message.isprintable() and len(message) < 3000, message
            assert any(name in message for name in named), message
    changed = {path for path, _ in before.items() ^ listing(root).items()}
    if written:
        place = Path.cwd() / written
        changed.discard(place.parent)  # where it is prepared
        if not message:
            changed -= {path for path in changed if path.is_relative_to(place)}
    assert not changed, f"it wrote {changed}"
    return message


# -- JSON --------------------------------------------------------------------------------------


def plan(**more: Any) -> planning.Plan:
    return planning.make_plan(dataclasses.replace(TRAIN, **more))


def read_epochs() -> None:
    for config in plan(load_epochs="epochs.json").configs.values():
        assert type(config.epochs) is int and config.epochs > 0


def read_rates() -> None:
    for config in plan(load_lrs="lrs.json").configs.values():
        assert 0 < config.lr < float("inf")


def read_hparams() -> None:
    """What is let through works."""
    methods = reading.choose_methods(dataclasses.replace(MERGE, no_eval=True))
    updates = {"layer": torch.randn(2, 4, 3)}
    for name, knobs in methods.items():
        merge(name, updates, **knobs)["layer"]


def read_models(**more: Any) -> Any:
    return reading.read_inputs(dataclasses.replace(MERGE, no_eval=True, **more))


def read_recipe() -> None:
    config = dataclasses.replace(MERGE, from_recipe="recipe.json", no_eval=True)
    recipe = merging.read_source(config)
    inputs = reading.read_inputs(config, recipe)
    merge(recipe.method, inputs.vectors, **recipe.knobs)


def read_args() -> None:
    """All that a merge with scores takes of them."""
    config = dataclasses.replace(MERGE, search=[1.0])
    scoring.open_session(config, reading.read_inputs(config), ["average"])


def go_on() -> None:
    write_args(Path("run"), json.loads(Path("../../../good/run/args.json").read_text()))


def read_dense(folder: str) -> None:
    checkpoint = read_checkpoint(Path(folder), lambda *_: (base(), head_tensors(base())))
    check_fits(checkpoint, base())
    TaskVectors.stack({"rte": checkpoint.updates})


def read_disk() -> None:
    read_data("disk")


JSONS: dict[str, tuple[str, Callable[[], object]]] = {
    "epochs": ("epochs.json", read_epochs),
    "rates": ("lrs.json", read_rates),
    "checkpoints to transform": (
        "models.json",
        lambda: plan(tasks=["rte"], load_model_path="models.json"),
    ),
    "checkpoints to merge": ("models.json", read_models),
    "knobs": ("hparams.json", read_hparams),
    "recipe": ("recipe.json", read_recipe),
    "settings of a run": ("run/args.json", read_args),
    "settings of a run to go on with": ("run/args.json", go_on),
    "adapter": (f"run/{CONFIG}", read_models),
    "shards": (f"shards/{INDEX}", lambda: read_dense("shards")),
    "save_to_disk": ("disk/rte/dataset_dict.json", read_disk),
    "save_to_disk split": ("disk/rte/train/dataset_info.json", read_disk),
    "save_to_disk state": ("disk/rte/train/state.json", read_disk),
}


@pytest.mark.parametrize("kind", JSONS)
@cases(50, len(JSONS))
@given(data=st.data())
def test_json(root, kind, data):
    path, act = JSONS[kind]
    content = data.draw(json_files(root / "good" / path))
    fresh(root, (path, content))
    named = path, path.partition("/")[0], "--load-model-path", "--from", "--data-dir", "--backbone"
    outcome(act, root, *named, written="run/args.json" if act is go_on else "")


# -- data --------------------------------------------------------------------------------------


def to_csv(rows: list[Any], delimiter: str) -> bytes:
    text = io.StringIO()
    out = csv.writer(text, delimiter=delimiter, escapechar="\\")
    header = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    out.writerow(header)
    for row in rows:
        out.writerow([row.get(name) for name in header] if isinstance(row, dict) else [row])
    return text.getvalue().encode("utf-8", "surrogatepass")


KINDS = [pa.binary(), pa.float16(), pa.date32(), pa.timestamp("ns"), pa.list_(pa.int8())]
KINDS += [pa.dictionary(pa.int8(), pa.string()), pa.decimal128(5, 2), pa.large_string(), pa.null()]
KINDS += [pa.duration("s"), pa.time64("ns"), pa.uint64(), pa.bool_(), pa.string()]


@st.composite
def tables(draw: st.DrawFn, ending: str, rows: list[dict[str, Any]]) -> bytes:
    """A data file: rows with changes, or columns of other kinds; its bytes perhaps damaged."""
    if ending == "jsonl":
        lines = [encoded(draw, row) for row in draw(lists_of(mutants(rows)))]
        return draw(damaged(b"\n".join(lines)))
    if ending != "parquet":
        delimiter = "," if ending == "csv" else "\t"
        return draw(damaged(to_csv(draw(lists_of(mutants(rows))), delimiter)))
    columns = draw(mutants({name: [row.get(name) for row in rows] for name in rows[0]}))
    table = {"label": None} if not isinstance(columns, dict) else columns
    arrays = [draw(columns_of(each)) for each in table.values()]
    named = [name.encode("utf-8", "replace").decode() for name in table]
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, named), out)
    return draw(damaged(out.getvalue().to_pybytes()))


@st.composite
def columns_of(draw: st.DrawFn, cells: Any) -> pa.Array:
    """Three cells, as they are or cast to another kind where that can be."""
    cells = (cells * 3)[:3] if isinstance(cells, list) and cells else [cells] * 3
    try:
        array = pa.array(cells)
    except (pa.ArrowException, OverflowError, UnicodeError):
        array = pa.array([repr(each) for each in cells])
    try:
        return array.cast(draw(st.sampled_from([array.type, *KINDS])))
    except pa.ArrowException:
        return array


def lists_of(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return strategy.map(lambda value: value if isinstance(value, list) else [value])


def read_data(folder: str) -> None:
    """All that training takes of it."""
    task = TASKS["rte"]
    loaded = load_task(task, folder)
    for split in loaded.values():
        assert len(split) and {*split["label"]} <= {0, 1}
    data = split_task(loaded, 42, 2)
    fingerprint(data.selection)
    tokenize(data.selection, task, tokenizer(), 16)


@cache
def tokenizer() -> Any:
    return load_tokenizer(find_backbone("backbone"))


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv", "tsv"])
@cases(60, 4)
@given(data=st.data())
def test_data(root, ending, data):
    rows = [{"sentence1": "a dog", "sentence2": "a\tcat,\n", "label": i % 2} for i in range(3)]
    rows[0] |= {"idx": 1}
    content = data.draw(tables(ending, rows))
    fresh(root, (f"fuzz/rte/train.{ending}", content))
    shutil.copy("data/rte/validation.jsonl", "fuzz/rte")
    outcome(lambda: read_data("fuzz"), root, "fuzz/rte")


# -- tensors -----------------------------------------------------------------------------------


def read_adapters() -> None:
    """What is let through can be merged, and fits its base or is refused."""
    inputs = read_models()
    merged = merge("ties", inputs.vectors)
    assert all(merged[name].isfinite().all() for name in merged)
    reading.check_base(inputs)


@cases(150)
@given(data=st.data())
def test_adapter(root, data):
    content = data.draw(tensor_files(root / "good/run" / WEIGHTS))
    fresh(root, (f"run/{WEIGHTS}", content))
    outcome(read_adapters, root, "run", "'rte'")


@pytest.mark.parametrize("file", [f"dense/{DENSE}", "shards/model-00001-of-00005.safetensors"])
@cases(60, 2)
@given(data=st.data())
def test_dense(root, file, data):
    content = data.draw(tensor_files(root / "good" / file))
    fresh(root, (file, content))
    folder = file.partition("/")[0]
    outcome(lambda: read_dense(folder), root, folder, "'rte'")


@st.composite
def signed(draw: st.DrawFn, good: Path) -> bytes:
    """A file of a bank or cache: bytes changed, or the header, with its checksum right."""
    if draw(st.booleans()):
        return draw(tensor_files(good))
    header = draw(mutants(json.loads(split(good)[0]["__metadata__"]["header"])))
    tensors = load(good)
    if isinstance(header, dict):
        from osrm.tensor_file import _checksum

        header.pop("sha256", None)
        header["sha256"] = _checksum(header, tensors, tensors.__getitem__)
    text = encoded(draw, header).decode("utf-8", "replace")
    return safetensors.torch.save(tensors, {"header": text})


def read_features() -> None:
    settings = {"features": "token", "count_padding": False}
    settings["body_fingerprint"] = body_fingerprint(base())
    for file in read_bank(Path("bank")).values():
        check_comparable(file, settings, [*projections(base(), "qv", 2)])
        for name in file:
            file[name]


@cases(120)
@given(data=st.data())
def test_feature_bank(root, data):
    content = data.draw(signed(root / "good/bank/ninth.safetensors"))
    fresh(root, ("bank/ninth.safetensors", content))
    outcome(read_features, root, "bank/ninth.safetensors")


@cases(120)
@given(data=st.data())
def test_fisher_cache(root, data):
    """What is damaged is computed again."""
    content = data.draw(signed(root / "good/fisher.safetensors"))
    fresh(root, ("fisher.safetensors", content))

    def write(path: Path) -> None:
        shutil.copy(root / "good/fisher.safetensors", path)

    def read() -> None:
        dict(cached(Path("fisher.safetensors"), TensorFile, write))

    assert not outcome(read, root, written="fisher.safetensors")


# -- flags -------------------------------------------------------------------------------------


class Checked(Exception):
    """All checks are done; the long work would begin."""


def stop(*_: object, **__: object) -> None:
    raise Checked


WHOLE = ["0", "-1", "1", "2", "3", "33", str(2**63), "1" + "0" * 400, "9" * 5000]
REAL = ["0", "-1", "0.5", "1", "0.3", "nan", "inf", "-inf", "1e400", "1e-400"]
GOOD: dict[str, list[str]] = {
    **{name: ["rte", "sst2", "stsb"] for name in ("tasks", "other_tasks")},
    "load_model_path": ["models.json"],
    "load_epochs": ["epochs.json"],
    "load_lrs": ["lrs.json"],
    "from_recipe": ["recipe.json"],
    "hparams": ["hparams.json"],
    "feature_bank": ["bank", "new"],
    "data_dir": ["data", "disk"],
    "backbone": ["backbone"],
    "output_dir": ["new", "run"],
    "report_to": ["none", "all"],
    "block": ["q", "kv", "qkv"],
    "freeze": ["A", "B", "N", "AB"],
    "methods": ["all", *METHODS],
    "weights": ["rte=2", "rte=nan", "sst2=1", "rte"],
}


def fits_command_line(text: str) -> bool:
    ascii_or_bytes = re.sub("[\udc80-\udcff]", "", text).isascii()
    return "\0" not in text and (ascii_or_bytes or is_utf8(text))


texts = (st.sampled_from(["1_0", "²", "0x1", "run"]) | names).filter(fits_command_line)


@st.composite
def flags(draw: st.DrawFn, cls: type) -> list[str]:
    """Some flags of a script, most of them with values of the right kind, in and out of range."""
    argv = []
    chosen = draw(st.lists(st.sampled_from(dataclasses.fields(cls)), max_size=4))
    for field in chosen:
        name, options = "--" + field.name.replace("_", "-"), field.metadata["options"]
        kind = options.get("type", type(field.default))
        usual = options.get("choices") or GOOD.get(field.name) or (WHOLE if kind is int else REAL)
        value = st.sampled_from(usual) if draw(st.integers(0, 5)) else texts
        if isinstance(field.default, bool):
            argv.append(name)
        elif field.default_factory is not dataclasses.MISSING:
            argv += [name, *draw(st.lists(value, min_size=1, max_size=3))]
        else:
            argv.append(f"{name}={draw(value)}")
    return argv


def checked(cls: type, argv: list[str], run: Callable[[Any], None]) -> None:
    try:
        run(parse(cls, "", argv))
    except Checked:
        pass
    except SystemExit as end:
        assert end.code == 2


@cases(150)
@given(argv=flags(TrainConfig))
def test_flags_of_train(root, argv):
    fresh(root)
    given = ["--backbone", "backbone", "--data-dir", "data", "--tasks", "rte"]
    with (
        mock.patch.object(planning, "starts", stop),
        mock.patch.object(session, "task_features", stop),
        mock.patch("osrm.commands.transform.move", stop),
    ):
        outcome(
            lambda: checked(TrainConfig, [*given, *argv], training.train),
            root,
            "--",
            ".save_dir/rte",
        )


@cases(150)
@given(argv=flags(MergeConfig))
def test_flags_of_merge(root, argv):
    fresh(root)
    given = ["--load-model-path", "models.json", "--hparams", "hparams.json"]
    with mock.patch.object(merging, "describe", stop):
        outcome(lambda: checked(MergeConfig, [*given, *argv], merging.run), root, "--")


# -- names -------------------------------------------------------------------------------------


good_names = st.sampled_from(["rte", "a-b", "été", "é" * 60, "_", "1.json", "README.md", "con"])
tasks_of_names = st.one_of(good_names, good_names, good_names, names)


@cases(80)
@given(data=st.data())
def test_names_stay_names(root, data):
    """Whatever tasks, layers and bases are called, a merge writes into its directory alone."""
    good = root / "good" / "run"
    tensors = load(good / WEIGHTS)
    layer = data.draw(st.lists(tensor_names, min_size=1, max_size=3).map(".".join))
    old = next(name for name in tensors if "lora_A" in name).removesuffix(".lora_A.weight")
    tensors = {
        name.replace(old, f"base_model.model.{layer}"): each for name, each in tensors.items()
    }
    head = data.draw(st.sampled_from(["classifier", "x/y"]) | tensor_names)
    tensors = {name.replace("classifier", head): each for name, each in tensors.items()}
    options = json.loads((good / CONFIG).read_text())
    options["modules_to_save"] = [head]
    options["base_model_name_or_path"] = data.draw(names)
    tasks = data.draw(st.lists(tasks_of_names, min_size=1, max_size=2, unique=True))
    fresh(
        root,
        (f"run/{WEIGHTS}", safetensors.torch.save(tensors)),
        (f"run/{CONFIG}", json.dumps(options).encode()),
        ("models.json", json.dumps(dict.fromkeys(tasks, "run")).encode()),
    )
    Path("run/args.json").unlink()
    methods = ["task_arithmetic"]
    config = dataclasses.replace(MERGE, no_eval=True, methods=methods, export=["adapter"])
    config = dataclasses.replace(config, output_dir="out")
    if outcome(lambda: merging.run(config), root, "models.json", "run/", written="out"):
        return
    for method in methods:
        for task in tasks:
            merged = MergedUpdate(Path("out", method), task)
            assert all(merged[name].isfinite().all() for name in merged)


# -- whole scripts -----------------------------------------------------------------------------


@pytest.mark.parametrize("script, cls", [("train_glue.py", TrainConfig), ("merge.py", MergeConfig)])
@cases(20, 2)
@given(data=st.data())
def test_script(root, script, cls, data):
    """One line on stderr and exit code 2."""
    argv = data.draw(flags(cls))
    fresh(root)
    main = runpy.run_path(str(ROOT / script))["main"]
    before = listing(root)
    errors = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [script, *argv, "--output-dir=epochs.json"]),
        mock.patch.object(sys, "stderr", errors),
    ):
        try:
            code = run_script(main)
        except SystemExit as end:
            code = end.code
    assert code == 2
    line = errors.getvalue().splitlines()[-1]
    assert line.startswith(f"{script}: error: "), errors.getvalue()
    assert listing(root) == before


def test_there_are_a_thousand_cases():
    assert sum(CASES) >= 1000
