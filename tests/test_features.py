"""Features: hooks that leave no trace, one statistic an input, padding that does not count."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from osrm.backbones import projections
from osrm.bank import COMPARABLE, FeatureFile, check_comparable, read_bank, task_features
from osrm.errors import UserError
from osrm.features import TokenMask, collect, pool, recorded_inputs, token_masks
from osrm.moments import Moment
from osrm.starts import STARTS, StartConfig, starts
from tests.conftest import WORDS

TEXTS = ["a good dog runs", "the cat", "no man is old", "a very bad film was not good"]


def model_and_batch(directory, pad_to=None, texts=TEXTS):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {"padding": True}
    return model, dict(tokenizer(texts, return_tensors="pt", **padding)), tokenizer


def moment_of(statistic: Moment) -> np.ndarray:
    return statistic.gram.numpy() / statistic.count


def second_moment(rows: np.ndarray) -> np.ndarray:
    return rows.T @ rows / len(rows)


def entered(model, modules, tokenizer, texts) -> dict[str, list[np.ndarray]]:
    """What enters each module, (tokens, d) for each text: alone, unpadded, by forward hooks."""
    found = {name: [] for name in modules}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: found[name].append(args[0][0].double().numpy())
        )
        for name in modules
    ]
    with torch.no_grad():
        for text in texts:
            model(**tokenizer(text, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    return found


# -- what counts -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["roberta", "bert", "mpnet", "distilbert", "t5", "llama"])
@pytest.mark.parametrize("features", ["token", "sample", "mean"])
def test_moments_are_those_of_what_enters_each_layer_one_text_at_a_time(tiny, family, features):
    """Batching and padding change nothing: texts alone, unpadded, are the independent oracle."""
    model, batch, tokenizer = model_and_batch(tiny[family])
    modules = projections(model, "qkv", 2)
    totals, leaders = collect(model, modules, [batch], features)
    oracle = entered(model, modules, tokenizer, TEXTS)
    for name in modules:
        means = np.stack([tokens.mean(0) for tokens in oracle[name]])
        rows = {
            "token": np.concatenate(oracle[name]),
            "sample": means,
            "mean": means.mean(0, keepdims=True),
        }[features]
        total = totals[leaders[name]]
        assert total.count == len(rows)
        np.testing.assert_allclose(moment_of(total), second_moment(rows), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [3, 20, 17]])
@pytest.mark.parametrize("features", ["token", "sample", "mean"])
def test_how_examples_are_batched_does_not_matter(tiny, features, sizes):
    """Nor does the form of the statistic: 40 examples are more than the 32 numbers of a layer."""
    texts = [" ".join(WORDS[i % 7 : i % 7 + 1 + i % 5]) for i in range(40)]
    model, _, tokenizer = model_and_batch(tiny["roberta"])
    modules = projections(model, "q", 2)
    ends = np.cumsum(sizes)
    parts = [texts[end - size : end] for size, end in zip(sizes, ends)]
    batches = [dict(tokenizer(part, return_tensors="pt", padding=True)) for part in parts]
    totals, _ = collect(model, modules, iter(batches), features)
    oracle = entered(model, modules[-1:], tokenizer, texts)[modules[-1]]
    means = np.stack([tokens.mean(0) for tokens in oracle])
    rows = {"token": np.concatenate(oracle), "sample": means, "mean": means.mean(0)[None]}[features]
    total = totals[modules[-1]]
    assert total.count == len(rows) and total.is_rows == (features == "mean")
    np.testing.assert_allclose(moment_of(total), second_moment(rows), rtol=1e-4, atol=1e-5)


def test_query_key_and_value_of_a_layer_share_one_statistic(tiny):
    model, batch, _ = model_and_batch(tiny["roberta"])
    totals, leaders = collect(model, projections(model, "qkv", 2), [batch], "token")
    assert len(leaders) == 6 and len(totals) == 2  # two layers


def test_the_decoders_cross_attention_reads_two_inputs(tiny):
    """T5: the query reads the decoder, key and value read the encoder."""
    model, batch, _ = model_and_batch(tiny["t5"])
    _, leaders = collect(model, projections(model, "qkv", 2), [batch], "token")
    cross = "transformer.decoder.block.1.layer.1.EncDecAttention."
    assert leaders[cross + "k"] == leaders[cross + "v"] != leaders[cross + "q"]


@pytest.mark.parametrize("features", ["token", "sample", "mean"])
def test_padding_counts_only_when_asked(tiny, features):
    model, short, _ = model_and_batch(tiny["roberta"])
    _, long, _ = model_and_batch(tiny["roberta"], pad_to=40)
    modules = projections(model, "q", 2)

    def moment(batch, count_padding):
        totals, _ = collect(model, modules, [batch], features, count_padding=count_padding)
        return moment_of(totals[modules[0]])

    np.testing.assert_allclose(moment(short, False), moment(long, False), rtol=1e-5, atol=1e-7)
    assert abs(moment(short, False) - moment(long, True)).max() > 1e-2 * moment(short, False).max()


@pytest.mark.parametrize("features", ["token", "sample"])
@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 2, 5, 4), (3, 4)])
def test_without_a_mask_every_position_counts(features, shape):
    """Texts, images (batch, h, w, d), and one vector an example."""
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tokens = inputs.numpy().reshape(3, -1, 4)
    expected = tokens.reshape(-1, 4) if features == "token" else tokens.mean(1)
    np.testing.assert_allclose(pool(inputs, [], features), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_half_precision_inputs_are_taken_in_float32(dtype):
    inputs = (torch.rand(2, 500, 3, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
    mask = torch.arange(500).expand(2, -1) < torch.tensor([[400], [500]])
    expected = [row[keep].double().mean(0) for row, keep in zip(inputs, mask)]
    found = pool(inputs, [TokenMask.of(mask)], "sample")
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=0)


ENCODER, DECODER = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([[1, 0], [1, 1]])
MASKS = {
    "the encoder's": ({"attention_mask": ENCODER}, (2, 3, 4), ENCODER),
    "the decoder's": (
        {"attention_mask": ENCODER, "decoder_attention_mask": DECODER},
        (2, 2, 4),
        DECODER,
    ),
    "the encoder's, for what the decoder reads of it": (
        {"decoder_attention_mask": DECODER, "attention_mask": ENCODER},
        (2, 3, 4),
        ENCODER,
    ),
    "none for other positions": ({"attention_mask": ENCODER}, (2, 2, 4), None),
    "none for one vector an example": ({"attention_mask": ENCODER}, (2, 4), None),
    "none for images": ({"pixel_values": torch.ones(2, 3, 4, 4)}, (2, 4, 4, 8), None),
    "none is given": ({"input_ids": ENCODER}, (2, 3, 4), None),
    "it is None": ({"attention_mask": None}, (2, 3, 4), None),
    "a lone tensor": (torch.ones(2, 3), (2, 3, 4), None),
}


@pytest.mark.parametrize("case", MASKS)
def test_the_mask_is_the_one_that_fits(case):
    batch, shape, expected = MASKS[case]
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = inputs.flatten(0, -2) if expected is None else inputs[expected.bool()]
    assert torch.equal(pool(inputs, token_masks(batch), "token"), rows)


class Convolutional(nn.Module):
    """Channels last, as in ConvNeXt and Swin: layers read (batch, h, w, d)."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)
        self.never, self.nor = nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, pixels):
        return self.second(self.first(pixels).relu())


def test_images_in_batches_of_one_tensor():
    model = Convolutional()
    images = torch.randn(6, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    totals, leaders = collect(model, ["first", "second"], images.split(4), "token")
    assert leaders == {"first": "first", "second": "second"}
    rows = images.double().numpy().reshape(-1, 3)
    assert totals["first"].count == 6 * 16 == totals["second"].count
    np.testing.assert_allclose(moment_of(totals["first"]), second_moment(rows), rtol=1e-6)
    hidden = model.first(images).relu().detach().double().numpy().mean((1, 2))
    samples = collect(model, ["second"], [images], "sample")[0]["second"]
    np.testing.assert_allclose(moment_of(samples), second_moment(hidden), rtol=1e-5)


def test_layers_that_never_ran_are_refused_by_name():
    images = torch.ones(2, 4, 4, 3)
    with pytest.raises(ValueError, match=r"2 layers never ran \(never, nor\)"):
        collect(Convolutional(), ["first", "never", "second", "nor"], [images], "token")
    with pytest.raises(UserError, match=r"features of 'rte': .*never ran \(never\)"):
        task_features(settings(), Convolutional(), ["first", "never"], [images])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused_and_leave_no_file(value, own_feature_cache):
    model = Convolutional()
    model.first.weight.data[:] = value
    with pytest.raises(UserError, match=r"features of 'rte': NaN or infinity .*second"):
        task_features(settings(), model, ["first", "second"], [torch.ones(2, 4, 4, 3)])
    assert not [path for path in own_feature_cache.rglob("*") if path.is_file()]


def test_the_model_is_lent_and_comes_back(tiny):
    """Own hooks go even after an error, foreign ones stay; so does the training mode."""
    model, batch, _ = model_and_batch(tiny["roberta"])
    model.train()
    modules = projections(model, "q", 2)
    layer = model.get_submodule(modules[0])
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(IndexError):
        collect(model, modules, [{**batch, "input_ids": batch["input_ids"] + 1000}], "token")
    assert len(layer._forward_pre_hooks) == 1 and model.training
    collect(model, modules, [batch], "token")
    assert len(layer._forward_pre_hooks) == 1 and model.training and calls


def test_recorded_inputs_are_what_the_layer_saw(tiny):
    model, batch, _ = model_and_batch(tiny["roberta"])
    modules = projections(model, "qv", 2)
    seen = []
    model.get_submodule(modules[0]).register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with recorded_inputs(model, modules) as (inputs, leaders), torch.no_grad():
        model(**batch)
    assert inputs[leaders[modules[1]]] is inputs[modules[0]] is seen[0]


# -- files -------------------------------------------------------------------------------------


def settings(**more):
    return {"task": "rte", "features": "token", "count_padding": False, **more}


def rows(n, d=4, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def good(tmp_path):
    """A file of few vectors and a sum, two modules sharing the latter."""
    path = tmp_path / "bank" / "rte.safetensors"
    totals = {"a": Moment.of(rows(2)), "b": Moment.of(rows(9, seed=1))}
    FeatureFile.save(path, settings(data="x"), totals, {"a": "a", "b": "b", "c": "b"})
    return path


def test_a_file_gives_back_what_was_saved(good):
    file = FeatureFile(good)
    assert file.settings == settings(data="x")
    assert file.leaders == {"a": "a", "b": "b", "c": "b"} and [*file] == ["a", "b", "c"]
    assert len(file) == 3 and "c" in file and "d" not in file
    assert file["a"].is_rows and torch.equal(file["a"].data, rows(2)) and file["a"].count == 2
    expected = Moment.of(rows(9, seed=1))
    for name in "bc":
        assert file[name].count == 9 and not file[name].is_rows
        assert torch.equal(file[name].data, expected.data)


def test_few_vectors_take_less_room_than_their_sum(tmp_path):
    few, many = tmp_path / "few", tmp_path / "many"
    FeatureFile.save(few, settings(), {"a": Moment.of(rows(5, d=300))}, {"a": "a"})
    FeatureFile.save(many, settings(), {"a": Moment.of(rows(300, d=300))}, {"a": "a"})
    assert few.stat().st_size < 5 * 300 * 4 + 1000
    assert many.stat().st_size > 300 * 300 * 8


def test_files_hold_tensors_and_plain_json_and_no_text_of_the_task(tiny):
    texts = ["a good dog runs", "the cat"]
    model, batch, _ = model_and_batch(tiny["roberta"], texts=texts)
    modules = projections(model, "qv", 2)
    path = task_features(settings(), model, modules, [batch]).path
    with safe_open(path, "pt") as file:
        assert {*file.metadata()} == {"header"}
        header = json.loads(file.metadata()["header"])
    assert header.keys() == {"settings", "leaders", "counts", "sha256"}
    assert {*header["leaders"]} == {*modules} and {*header["counts"]} == {*load_file(path)}
    assert all(word not in path.read_bytes() for word in (b"good", b"dog", b"runs"))


def test_the_same_statistics_make_the_same_bytes(good, tmp_path):
    file = FeatureFile(good)
    again = tmp_path / "again"
    FeatureFile.save(again, file.settings, {"a": file["a"], "b": file["b"]}, file.leaders)
    assert again.read_bytes() == good.read_bytes()


def test_a_file_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("osrm.tensor_file.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FeatureFile.save(tmp_path / "rte.safetensors", settings(), {}, {})
    assert not [*tmp_path.glob("*.safetensors")] and read_bank(tmp_path) == {}


def unchecked(count, data):
    """A statistic that `Moment` itself would not make."""
    moment = object.__new__(Moment)
    vars(moment).update(count=count, data=data)
    return moment


def gram(n=9):
    return Moment.of(rows(n)).data


WRONG = {
    "count above the vectors": unchecked(3, rows(2)),
    "count below the vectors": unchecked(1, rows(2)),
    "count is text": unchecked("2", rows(2)),
    "count of a sum is text": unchecked("9", gram()),
    "a sum of nothing": unchecked(0, gram()),
    "a negative count": unchecked(-9, gram()),
    "vectors in float64": unchecked(2, rows(2).double()),
    "vectors in float16": unchecked(2, rows(2).half()),
    "a sum in float32": unchecked(9, gram().float()),
    "whole numbers": unchecked(2, torch.ones(2, 4, dtype=torch.int32)),
    "many vectors": unchecked(9, rows(9)),
    "one vector without a row": unchecked(1, rows(1)[0]),
    "three axes": unchecked(4, rows(4)[None].double()),
    "no numbers": unchecked(0, torch.zeros(0, 0).double()),
    "NaN in vectors": unchecked(2, rows(2) * float("nan")),
    "infinity in vectors": unchecked(2, rows(2) / 0),
    "NaN in a sum": unchecked(9, gram() * float("nan")),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_statistic_is_refused(tmp_path, case):
    """Whole files, their checksums right, of another program or of a bug."""
    path = tmp_path / "rte.safetensors"
    FeatureFile.save(path, settings(), {"a": WRONG[case]}, {"a": "a"})
    with pytest.raises(ValueError, match=r"no statistic|NaN|no file of feature statistics"):
        FeatureFile(path)


def header_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["header"])


def with_header(change):
    def damage(path):
        header = header_of(path)
        change(header)
        save_file(load_file(path), path, {"header": json.dumps(header)})

    return damage


def with_metadata(metadata):
    return lambda path: save_file(load_file(path), path, metadata)


def with_tensors(change):
    def damage(path):
        tensors, header = load_file(path), header_of(path)
        change(tensors)
        save_file(tensors, path, {"header": json.dumps(header)})

    return damage


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("statistics"),
    "absent": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "no metadata": with_metadata(None),
    "no header": with_metadata({"format": "pt"}),
    "header is no JSON": with_metadata({"header": "{"}),
    "header is a list": with_metadata({"header": "[]"}),
    "header is null": with_metadata({"header": "null"}),
    "header lacks settings": with_header(lambda header: header.pop("settings")),
    "header lacks leaders": with_header(lambda header: header.pop("leaders")),
    "header lacks counts": with_header(lambda header: header.pop("counts")),
    "header lacks a count": with_header(lambda header: header["counts"].pop("b")),
    "header lacks sha256": with_header(lambda header: header.pop("sha256")),
    "settings is a number": with_header(lambda header: header.update(settings=3)),
    "leaders is a list": with_header(lambda header: header.update(leaders=["a", "b"])),
    "another count": with_header(lambda header: header["counts"].update(b=90)),
    "another pooling": with_header(lambda header: header["settings"].update(features="mean")),
    "another leader": with_header(lambda header: header["leaders"].update(c="a")),
    "a leader of nothing": with_header(lambda header: header["leaders"].update(c="d")),
    "another number": with_tensors(lambda tensors: tensors["b"].view(-1)[5].mul_(1.5)),
    "another name": with_tensors(lambda tensors: tensors.update(d=tensors.pop("b"))),
    "a tensor less": with_tensors(lambda tensors: tensors.pop("b")),
    "a tensor more": with_tensors(lambda tensors: tensors.update(d=rows(2))),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_refused(good, case):
    DAMAGES[case](good)
    with pytest.raises(ValueError):
        FeatureFile(good)


def test_a_leader_without_a_tensor_is_refused_though_the_checksum_is_right(tmp_path):
    path = tmp_path / "rte.safetensors"
    FeatureFile.save(path, settings(), {"a": Moment.of(rows(2))}, {"a": "a", "b": "nothing"})
    with pytest.raises(ValueError, match="no file of feature statistics"):
        FeatureFile(path)


def test_wherever_a_file_is_cut_or_changed_it_is_refused(good):
    whole = good.read_bytes()
    for length in range(0, len(whole), 7):
        good.write_bytes(whole[:length])
        with pytest.raises(ValueError):
            FeatureFile(good)
    for i, byte in enumerate(whole):
        good.write_bytes(whole[:i] + bytes([byte ^ (1 << i % 8)]) + whole[i + 1 :])
        with pytest.raises(ValueError):
            FeatureFile(good)


# -- the cache ---------------------------------------------------------------------------------


def test_the_cache_serves_equal_settings_and_no_others(tiny, own_feature_cache):
    model, batch, _ = model_and_batch(tiny["roberta"])
    modules = projections(model, "qv", 2)
    fresh = task_features(settings(), model, modules, [batch])
    cached = task_features(settings(), None, modules, [])  # neither model nor data is touched
    assert cached.path == fresh.path and cached.sha256 == fresh.sha256
    for name in modules:
        assert torch.equal(cached[name].data, fresh[name].data)
    other = task_features(settings(data="other"), model, modules, [batch])
    fewer = task_features(settings(), model, modules[:2], [batch])
    assert len({fresh.path, other.path, fewer.path}) == 3
    assert not list((own_feature_cache / "features").glob(".*"))


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_cache_is_computed_again(tiny, caplog, damage):
    model, batch, _ = model_and_batch(tiny["roberta"])
    modules = projections(model, "qv", 2)
    path = task_features(settings(), model, modules, [batch]).path
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    task_features(settings(), model, modules, [batch])
    assert "damaged" in caplog.text and path.read_bytes() == whole


def test_a_file_of_a_given_name_is_written_anew_past_the_cache(tiny, tmp_path, own_feature_cache):
    model, batch, _ = model_and_batch(tiny["roberta"])
    modules = projections(model, "qv", 2)
    path = tmp_path / "new" / "rte.safetensors"
    file = task_features(settings(), model, modules, [batch], path=path)
    assert file.path == path and not (own_feature_cache / "features").exists()
    cached = task_features(settings(), model, modules, [batch])
    assert cached.path != path and cached.sha256 == file.sha256
    path.write_text("else")
    assert task_features(settings(), model, modules, [batch], path=path).sha256 == file.sha256


# -- the bank ----------------------------------------------------------------------------------


def test_a_bank_is_a_folder_of_files_named_after_their_tasks(good):
    for name in ("ninth.safetensors", "boolq-v2.safetensors"):
        (good.parent / name).write_bytes(good.read_bytes())
    (good.parent / ".rte.safetensors.123").write_text("of an interrupted process")
    (good.parent / "README.md").write_text("")
    bank = read_bank(good.parent)
    assert [*bank] == ["boolq-v2", "ninth", "rte"]
    assert all(torch.equal(file["a"].data, rows(2)) for file in bank.values())
    assert read_bank(good.parent / "absent") == {}


@pytest.mark.parametrize("case", ["text", "no header", "another number", "a folder"])
def test_a_damaged_file_of_a_bank_is_named(good, case):
    (good.parent / "cola.safetensors").write_bytes(good.read_bytes())
    DAMAGES[case](good)
    with pytest.raises(UserError, match=r"bank/rte\.safetensors: .*; get it again") as caught:
        read_bank(good.parent)
    assert "\n" not in str(caught.value)


def test_a_bank_that_is_no_folder_is_refused(good):
    with pytest.raises(UserError, match=rf"--feature-bank {good}: no folder"):
        read_bank(good)


HERE = {"body_fingerprint": "f00", "features": "token", "count_padding": False}
THERE = {"body_fingerprint": "ba7", "features": "sample", "count_padding": True}


def comparable(tmp_path, **there):
    path = tmp_path / "cola.safetensors"
    leaders = dict.fromkeys(["a", "b"], "a")
    FeatureFile.save(path, {**HERE, **there}, {"a": Moment.of(rows(2))}, leaders)
    return FeatureFile(path)


def test_equal_settings_are_comparable_whatever_else_the_file_says(tmp_path):
    file = comparable(tmp_path, task="boolq", samples=7, seed=3)
    for modules in (["a", "b"], ["b"]):
        check_comparable(file, {**HERE, "task": "rte", "samples": 100}, modules)


@pytest.mark.parametrize(
    "fields", [*[[name] for name in COMPARABLE], ["features", "count_padding"], [*COMPARABLE]]
)
def test_every_field_that_differs_is_named_with_the_file(tmp_path, fields):
    assert {*COMPARABLE} == {*HERE}
    file = comparable(tmp_path, **{name: THERE[name] for name in fields})
    with pytest.raises(UserError) as caught:
        check_comparable(file, HERE, ["a", "b"])
    message = str(caught.value)
    assert message.startswith(f"{file.path}: ") and "\n" not in message
    for name in COMPARABLE:
        difference = f"{name} is {THERE[name]!r} there, {HERE[name]!r} here"
        assert (difference in message) == (name in fields)


def test_fields_and_layers_that_the_file_lacks_are_named(tmp_path):
    file = comparable(tmp_path, features="mean")
    with pytest.raises(UserError) as caught:
        check_comparable(file, HERE, ["a", "c", "d"])
    assert "features is 'mean' there" in str(caught.value)
    assert "lacks 2 layers (c, ...)" in str(caught.value)
    path = tmp_path / "bare.safetensors"
    FeatureFile.save(path, {}, {"a": Moment.of(rows(2))}, {"a": "a"})
    with pytest.raises(UserError, match="body_fingerprint is None there, 'f00' here"):
        check_comparable(FeatureFile(path), HERE, ["a"])


# -- starts ------------------------------------------------------------------------------------


def write_features(path, moment):
    """A feature file of one module with the given second moment."""
    FeatureFile.save(path, settings(), {"m": Moment(10, moment.double() * 10)}, {"m": "m"})
    return FeatureFile(path)


def start(files, task, rank, seed=0, init="analytical", others=None):
    d = len(next(iter(files.values()))["m"].gram)
    found = starts(
        *(StartConfig(init, seed=seed), {"m": (rank, d)}, [task]),
        **{"features": files, "leaders": {"m": "m"}, "others": others or files},
    )
    return found[task]["m"]


def test_the_start_avoids_the_others_and_ignores_its_own(tmp_path):
    d = 6
    energy = {"rte": [9, 99, 9, 0, 0, 9], "sst2": [9, 0, 9, 9, 9, 9], "cola": [9, 0, 9, 9, 9, 0]}
    files = {
        task: write_features(tmp_path / task, torch.diag(torch.tensor(e, dtype=torch.float64)))
        for task, e in energy.items()
    }
    expected = torch.zeros(d)
    expected[1] = 1  # the one direction in which sst2 and cola have no energy
    A = start(files, "rte", rank=1)
    torch.testing.assert_close(A.abs()[0], expected)
    # What its own energy is does not matter, nor whether it is there at all.
    without_own = {task: file for task, file in files.items() if task != "rte"}
    files["rte"] = write_features(tmp_path / "rte", torch.zeros(d, d))
    for again in (start(files, "rte", rank=1), start(without_own, "rte", rank=1)):
        torch.testing.assert_close(again.abs()[0], expected)
    # Nor are tasks that are not to be avoided.
    files["more"] = write_features(tmp_path / "more", torch.diag(expected))
    A = start(files, "rte", rank=1, others=["rte", "sst2", "cola"])
    torch.testing.assert_close(A.abs()[0], expected)
    A = start(files, "rte", rank=1, others=["cola"])
    assert A[0, [1, 5]].norm() == pytest.approx(1), "both are free of cola"


def test_starts_in_one_null_space_differ_by_task_and_seed_only(tmp_path):
    """Release: tasks whose statistics leave a large null space all took the same corner of it."""
    d, rank = 64, 4
    generator = torch.Generator().manual_seed(0)
    files = {}
    for task in ("rte", "sst2", "cola", "stsb"):
        mean = torch.randn(d, generator=generator).double()
        files[task] = write_features(tmp_path / task, torch.outer(mean, mean))
    found = {task: start(files, task, rank) for task in files}
    for task, A in found.items():
        for other, file in files.items():
            if other != task:
                assert file["m"].energy(A) < 1e-10 * d * file["m"].mean_energy
    cosines = torch.linalg.svdvals(found["rte"] @ found["sst2"].T)
    assert cosines.median() < 0.6
    assert torch.equal(start(files, "rte", rank), found["rte"])
    assert not torch.equal(start(files, "rte", rank, seed=1), found["rte"])
    # Neither the other tasks of a run nor their order plays a part.
    turned = dict(reversed(files.items()))
    both = starts(
        *(StartConfig("analytical"), {"m": (rank, d)}, ["sst2", "rte"]),
        **{"features": turned, "leaders": {"m": "m"}, "others": files},
    )
    assert torch.equal(both["rte"]["m"], found["rte"])


@pytest.mark.parametrize("init", STARTS)
def test_modules_of_one_input_share_a_start_only_if_it_looks_at_features(init):
    widths = {"q": 8, "k": 8, "v": 8, "o": 6}
    leaders = {"q": "q", "k": "q", "v": "v", "o": "o"}
    features = {
        task: {
            name: Moment.of(rows(20, d, seed=i + ord(leaders[name]))) for name, d in widths.items()
        }
        for i, task in enumerate(("rte", "cola"))
    }
    looks = STARTS[init].needs_features
    both, features = [*features], features if looks else {}
    layers = {name: (3, d) for name, d in widths.items()}
    others = {"features": features, "leaders": leaders, "others": both}
    found = starts(StartConfig(init), layers, both, **others)
    A = found["rte"]
    assert {name: A[name].shape for name in A} == {name: (3, d) for name, d in widths.items()}
    assert torch.equal(A["q"], A["k"]) == looks
    assert not torch.equal(A["q"], A["v"])
    assert not any(torch.equal(A[name], found["cola"][name]) for name in widths)


def test_files_may_hold_more_layers_than_are_adapted(tmp_path):
    """A bank of q, k and v serves a run that adapts v alone, as does one of v alone: alike."""
    found = []
    for modules in (["q", "k", "v"], ["k", "v"], ["v"]):
        files = {}
        for i, task in enumerate(("rte", "cola", "sst2")):
            path = tmp_path / f"{task}-{len(modules)}"
            total = {modules[0]: Moment.of(rows(20, seed=i))}
            FeatureFile.save(path, settings(), total, dict.fromkeys(modules, modules[0]))
            files[task] = FeatureFile(path)
        leaders = files["rte"].leaders
        for init in ("analytical", "contrastive"):
            others = {"features": files, "leaders": leaders, "others": files}
            A = starts(StartConfig(init), {"v": (2, 4)}, ["rte"], **others)
            found.append((init, A["rte"]["v"]))
    for init, A in found:
        assert all(torch.equal(A, other) for name, other in found if name == init)


def test_files_may_group_the_same_layers_in_ways_of_their_own(tmp_path):
    """One task's file was made for q and v, another's for v alone."""
    files = {}
    for i, (task, modules) in enumerate({"rte": ["q", "v"], "cola": ["v"], "sst2": ["v"]}.items()):
        total = {modules[0]: Moment.of(rows(20, seed=i))}
        FeatureFile.save(tmp_path / task, settings(), total, dict.fromkeys(modules, modules[0]))
        files[task] = FeatureFile(tmp_path / task)
    leaders = files["rte"].leaders
    others = {"features": files, "leaders": leaders, "others": files}
    assert starts(StartConfig("analytical"), {"v": (2, 4)}, ["rte"], **others)["rte"]


def test_the_release_collapsed_here():
    """The last rows of a full SVD of few vectors: nearly the same for different statistics."""
    d, rank = 256, 8
    generator = np.random.default_rng(0)
    means = generator.normal(size=(8, d)) * np.linspace(3, 0.3, d)
    frames = [np.linalg.svd(np.delete(means, task, axis=0))[2][-rank:] for task in range(2)]
    cosines = np.linalg.svd(frames[0] @ frames[1].T, compute_uv=False)
    assert np.median(cosines) > 0.95
