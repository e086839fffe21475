"""Features: hooks that leave no trace, one accumulator an input, padding that does not count."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from osrm.backbones import projections
from osrm.covariance import Covariance
from osrm.features import FeatureFile, analytical_start, collect, recorded_inputs, task_features

TEXTS = ["a good dog runs", "the cat", "no man is old", "a very bad film was not good"]


def model_and_batch(directory, pad_to=None):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {"padding": True}
    return model, dict(tokenizer(TEXTS, return_tensors="pt", **padding)), tokenizer


@pytest.mark.parametrize("family", ["roberta", "bert", "mpnet", "distilbert", "t5", "llama"])
def test_moments_are_those_of_what_enters_each_layer_one_text_at_a_time(tiny, family):
    """Batching and padding change nothing: texts alone, unpadded, are the independent oracle."""
    model, batch, tokenizer = model_and_batch(tiny[family])
    modules = projections(model, "qkv", 2)
    totals, leaders = collect(model, modules, [batch], "token")
    entered = {name: [] for name in modules}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: entered[name].append(args[0][0].double().numpy())
        )
        for name in modules
    ]
    with torch.no_grad():
        for text in TEXTS:
            model(**tokenizer(text, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    for name in modules:
        rows = np.concatenate(entered[name])
        total = totals[leaders[name]]
        assert total.count == len(rows)
        np.testing.assert_allclose(total.moment, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)


def test_query_key_and_value_of_a_layer_share_one_accumulator(tiny):
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
    first = modules[0]

    def moment(batch, count_padding):
        return collect(model, modules, [batch], features, count_padding)[0][first].moment

    torch.testing.assert_close(moment(short, False), moment(long, False), rtol=1e-5, atol=1e-7)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(moment(short, False), moment(long, True), rtol=1e-2, atol=1e-4)


def test_sample_and_mean_features(tiny):
    model, batch, _ = model_and_batch(tiny["roberta"])
    modules = projections(model, "q", 2)
    with recorded_inputs(model, modules) as (inputs, _), torch.no_grad():
        model(**batch)
        tokens = inputs[modules[0]]
    means = torch.stack(
        [row[mask.bool()].mean(0) for row, mask in zip(tokens, batch["attention_mask"])]
    )
    samples = collect(model, modules, [batch], "sample")[0][modules[0]]
    assert samples.count == len(TEXTS)
    torch.testing.assert_close(samples.moment, Covariance.of(means).moment, rtol=1e-5, atol=1e-8)
    mean = collect(model, modules, [batch], "mean")[0][modules[0]]
    assert mean.count == 1 and not mean.scatter.any()
    torch.testing.assert_close(mean.mean, means.double().mean(0), rtol=1e-5, atol=1e-8)


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


def settings(**more):
    return {"task": "rte", "features": "token", "count_padding": False, **more}


def test_the_cache_serves_equal_settings_and_no_others(tiny, own_feature_cache):
    model, batch, _ = model_and_batch(tiny["roberta"])
    modules = projections(model, "qv", 2)
    fresh = task_features(settings(), model, modules, [batch])
    cached = task_features(settings(), None, modules, [])  # neither model nor data is touched
    assert cached.path == fresh.path
    for name in modules:
        torch.testing.assert_close(cached[name].moment, fresh[name].moment, rtol=0, atol=0)
    other = task_features(settings(data="other"), model, modules, [batch])
    assert other.path != fresh.path
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


def write_features(path, moments):
    """A feature file of one module with the given second moment, mean zero."""
    d = len(moments)
    FeatureFile.save(path, {"m": Covariance(10, torch.zeros(d).double(), moments * 10)}, {"m": "m"})
    return FeatureFile(path)


def test_the_start_avoids_the_others_and_ignores_its_own(tmp_path):
    d = 6
    energy = {"rte": [9, 9, 9, 0, 0, 9], "sst2": [9, 0, 9, 9, 9, 9], "cola": [9, 0, 9, 9, 9, 0]}
    files = {
        task: write_features(tmp_path / task, torch.diag(torch.tensor(e, dtype=torch.float64)))
        for task, e in energy.items()
    }
    start = analytical_start("rte", files, rank=1, seed=0)["m"]
    expected = torch.zeros(d)
    expected[1] = 1  # the one direction in which sst2 and cola have no energy
    torch.testing.assert_close(start.abs()[0], expected)
    energy["rte"] = [0] * d
    files["rte"] = write_features(tmp_path / "rte", torch.zeros(d, d).double())
    assert torch.equal(analytical_start("rte", files, rank=1, seed=0)["m"], start)


def test_starts_in_one_null_space_differ_by_task_and_seed_only(tmp_path):
    """Release: tasks whose statistics leave a large null space all took the same corner of it."""
    d, rank = 64, 4
    generator = torch.Generator().manual_seed(0)
    files = {}
    for task in ("rte", "sst2", "cola", "stsb"):
        mean = torch.randn(d, generator=generator).double()
        files[task] = write_features(tmp_path / task, torch.outer(mean, mean))
    starts = {task: analytical_start(task, files, rank, seed=0)["m"] for task in files}
    for task, A in starts.items():
        for other, file in files.items():
            if other != task:
                energy = torch.trace(A.double() @ file["m"].moment @ A.double().T)
                assert energy < 1e-10 * torch.trace(file["m"].moment)
    cosines = torch.linalg.svdvals(starts["rte"] @ starts["sst2"].T)
    assert cosines.median() < 0.6
    again = analytical_start("rte", files, rank, seed=0)["m"]
    assert torch.equal(again, starts["rte"])
    assert not torch.equal(analytical_start("rte", files, rank, seed=1)["m"], starts["rte"])


def test_the_release_collapsed_here():
    """The last rows of a full SVD of few vectors: nearly the same for different statistics."""
    d, rank = 256, 8
    generator = np.random.default_rng(0)
    means = generator.normal(size=(8, d)) * np.linspace(3, 0.3, d)
    frames = [np.linalg.svd(np.delete(means, task, axis=0))[2][-rank:] for task in range(2)]
    cosines = np.linalg.svd(frames[0] @ frames[1].T, compute_uv=False)
    assert np.median(cosines) > 0.95


def test_files_hold_tensors_and_plain_metadata_only(tiny):
    model, batch, _ = model_and_batch(tiny["roberta"])
    path = task_features(settings(), model, projections(model, "qv", 2), [batch]).path
    tensors = load_file(path)
    assert {name.rpartition("/")[2] for name in tensors} == {"mean", "scatter"}
    save_file(tensors, path)  # without metadata: not ours any more
    with pytest.raises(KeyError):
        FeatureFile(path)
