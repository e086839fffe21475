"""How long OSRM's start takes: beside the published release's procedure, and at Llama's size.

    python benchmarks/starts.py roberta            # token ids -> A of 8 tasks x 48 modules
    python benchmarks/starts.py llama --layers 4   # statistics -> A of 8 tasks, d = 4096

Weights, tokens and statistics are random: nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from common import TASKS, Cost, flags, measured, parse, report, roberta_config, table
from torch import Tensor, nn
from transformers import RobertaModel

from osrm.data import batches_by_length
from osrm.features import collect, recorded_inputs
from osrm.moments import Moment
from osrm.starts import StartConfig, starts

# Mean tokens of an example: both sentences and RoBERTa's special tokens.
TOKENS = dict(zip(TASKS, (53, 51, 31, 70, 13, 40, 11, 31)))
SPREAD = 0.4  # standard deviation of the lengths over their mean; lognormal
LONGEST = 128
START, PADDING, END, VOCABULARY = 0, 1, 2, 50265  # RoBERTa's ids
BATCH = 64  # train_glue.py's --per-device-eval-bsz

# Eigenvalues of a layer's input relative to the largest. The shape is that of all-MiniLM-L6-v2
# (d = 384, layers 1 to 5, 100 examples of each of 8 tasks): one direction nearly without energy
# (LayerNorm's), then steep, then flat, and steep again at the top. The first points are counted
# from the bottom (the 1st, 2nd, 8th and 16th smallest), the others are shares of d.
SMALLEST = {0: 2e-5, 1: 4.4e-4, 7: 6e-4, 15: 9e-4}
SHARES = {1 / 6: 1.6e-3, 1 / 2: 5e-3, 3 / 4: 1.5e-2, 9 / 10: 3.5e-2, 0.98: 0.1, 1: 1.0}

RANK, LLAMA_LAYERS = 8, 32
COMPARED = ("analytical", "contrastive")


def draw_examples(samples: int, generator: torch.Generator) -> dict[str, list[Tensor]]:
    """Token ids of every task's examples, not padded."""
    sigma = np.log(1 + SPREAD**2) ** 0.5
    data = {}
    for task, mean in TOKENS.items():
        gaussian = torch.randn(samples, generator=generator, dtype=torch.float64)
        lengths = (mean * torch.exp(sigma * gaussian - sigma**2 / 2)).round().clamp(4, LONGEST)
        data[task] = [
            torch.randint(END + 1, VOCABULARY, (int(length),), generator=generator)
            for length in lengths
        ]
        for ids in data[task]:
            ids[0], ids[-1] = START, END
    return data


def padded(examples: Sequence[Tensor], length: int) -> dict[str, Tensor]:
    """The model's arguments for a batch."""
    ids = torch.full((len(examples), length), PADDING)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example)], mask[row, : len(example)] = example, 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def release_means(
    model: nn.Module, modules: Sequence[str], examples: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The release's features: batches of one, padded to 128 tokens, the padding counted."""
    device = next(model.parameters()).device
    widths = {name: model.get_submodule(name).in_features for name in modules}
    sums = {name: torch.zeros(width, device=device) for name, width in widths.items()}
    with recorded_inputs(model, modules) as (inputs, leaders):
        for example in examples:
            batch = padded([example], LONGEST)
            model(**{name: tensor.to(device) for name, tensor in batch.items()})
            for name, leader in leaders.items():
                sums[name] = sums[name] + inputs[leader].mean(dim=1).mean(dim=0)
            inputs.clear()
    return {name: total / len(examples) for name, total in sums.items()}


def release_starts(
    means: Mapping[str, Mapping[str, Tensor]], rank: int
) -> dict[str, dict[str, Tensor]]:
    """The release's A: the last rows of a full SVD of the other tasks' means, each module anew."""
    return {
        task: {
            name: torch.linalg.svd(
                torch.stack([means[other][name] for other in means if other != task])
            )[2][-rank:]
            for name in means[task]
        }
        for task in means
    }


def our_moments(
    model: nn.Module, modules: Sequence[str], data: Mapping[str, Sequence[Tensor]]
) -> tuple[dict[str, dict[str, Moment]], dict[str, str]]:
    """Our statistics of all tokens, as train_glue.py collects them."""

    def batches(examples: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
        lengths = [len(example) for example in examples]
        for batch in batches_by_length(lengths, BATCH):
            yield padded([examples[index] for index in batch], max(lengths[i] for i in batch))

    moments, leaders = {}, {}
    for task, examples in data.items():
        moments[task], leaders = collect(model, modules, batches(examples), "token")
    return moments, leaders


def record(procedure: str, features: Cost, subspaces: Cost) -> dict[str, Any]:
    """A run of one procedure: seconds of its two steps and of both, peak memory."""
    return {
        "procedure": procedure,
        "features": features.seconds,
        "subspaces": subspaces.seconds,
        "seconds": features.seconds + subspaces.seconds,
        "peak": max(features.peak, subspaces.peak),
    }


def both_procedures(
    width: int, layers: int, samples: int, dtypes: Sequence[str], device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """Ours and the release's in these precisions, in one process, in turn."""
    torch.manual_seed(0)
    model = RobertaModel(roberta_config(width, layers), add_pooling_layer=False).eval().to(device)
    data = draw_examples(samples, torch.Generator().manual_seed(0))
    modules = [
        f"encoder.layer.{layer}.attention.self.{part}"
        for layer in range(layers)
        for part in ("query", "value")
    ]
    shapes = dict.fromkeys(modules, (RANK, width))
    for dtype in dtypes:
        model = model.to(getattr(torch, dtype))
        release_means(model, modules, data["cola"][:1])  # warm up
        with measured(device) as features:
            moments, leaders = our_moments(model, modules, data)
        with measured(device) as subspaces:
            given = {"features": moments, "leaders": leaders, "others": data}
            starts(StartConfig("analytical"), shapes, data, **given)
        yield record(f"ours, {dtype}", features, subspaces)
        del moments
        with measured(device) as features:
            means = {task: release_means(model, modules, data[task]) for task in data}
        with measured(device) as subspaces:
            release_starts(means, RANK)
        yield record(f"release, {dtype}", features, subspaces)


def roberta(args: argparse.Namespace) -> None:
    """Both procedures in both precisions."""
    dtypes = ("float32", "bfloat16")
    runs = [*both_procedures(args.width or 1024, args.layers or 24, args.samples, dtypes)]
    columns = {
        "procedure": "{procedure}",
        "features, s": "{features:.1f}",
        "subspaces, s": "{subspaces:.1f}",
        "in all, s": "{seconds:.1f}",
        "times ours, float32": "{float32:.1f}",
        "times ours, bfloat16": "{bfloat16:.1f}",
        "peak memory, GiB": "{peak:.1f}",
    }
    for run in runs:
        run["float32"], run["bfloat16"] = (run["seconds"] / runs[i]["seconds"] for i in (0, 2))
    report(args, table(columns, runs), {"runs": runs})


def spectrum(d: int) -> Tensor:
    """d eigenvalues, ascending: geometric between the points above."""
    points = SMALLEST | {share * (d - 1): value for share, value in SHARES.items()}
    places = sorted(points)
    values = np.interp(np.arange(d), places, np.log([points[place] for place in places]))
    return torch.from_numpy(np.sort(np.exp(values)))


def synthetic_moments(
    d: int, tasks: Sequence[str], seed: int, device: str = "cpu"
) -> dict[str, Moment]:
    """One layer's statistics: a spectrum that all tasks share, and directions of each task's own.

    S = D + F Fᵀ. D has the eigenvalues of `spectrum`, each times a lognormal factor of the task
    (sigma 0.3). F = D^½ G has 32 gaussian columns, so the energy of the task's own directions is
    relative to what is usual there.
    """
    generator = torch.Generator().manual_seed(seed)
    common = spectrum(d)
    moments = {}
    for index, task in enumerate(tasks):
        factors = torch.randn(d, generator=generator, dtype=torch.float64)
        F = torch.randn(d, 32, generator=generator, dtype=torch.float64)
        F *= (common / d).sqrt()[:, None]
        F = F.to(device)
        data = torch.diag((common * (0.3 * factors).exp()).to(device)).addmm_(F, F.T)
        count = d + 1000 * (index + 1)
        moments[task] = Moment(count, data.mul_(count))
    return moments


def subspaces(layers: int, width: int, device: str = "cpu") -> dict[str, Cost]:
    """{start: the cost of one problem} of these layers, one after the other.

    Making the statistics is not timed.
    """
    costs = {init: Cost() for init in COMPARED}
    for layer in range(layers):
        modules = [f"layers.{layer}.self_attn.{part}_proj" for part in "qkv"]
        leaders, shapes = dict.fromkeys(modules, modules[0]), dict.fromkeys(modules, (RANK, width))
        moments = synthetic_moments(width, TASKS, layer, device)
        features = {task: dict.fromkeys(modules, moment) for task, moment in moments.items()}
        for init in COMPARED:
            with measured(device) as cost:
                given = {"features": features, "leaders": leaders, "others": TASKS}
                starts(StartConfig(init), shapes, TASKS, **given)
            costs[init].seconds += cost.seconds / layers / len(TASKS)
            costs[init].peak = max(costs[init].peak, cost.peak)
        print(f"layer {layer + 1} of {layers}: {costs}", flush=True)
        del moments, features
    return costs


def llama(args: argparse.Namespace) -> None:
    """The problems of these layers."""
    costs = subspaces(args.layers or LLAMA_LAYERS, args.width or 4096)
    problems = LLAMA_LAYERS * len(TASKS)
    runs = [
        {"start": init, "seconds": cost.seconds, "all": cost.seconds * problems, "peak": cost.peak}
        for init, cost in costs.items()
    ]
    columns = {
        "start": "{start}",
        "seconds a problem": "{seconds:.2f}",
        f"{problems} problems, s": "{all:.0f}",
        "peak memory, GiB": "{peak:.1f}",
    }
    report(args, table(columns, runs), {"runs": runs})


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags and run one part."""
    parser = flags(__doc__)
    parser.add_argument("part", choices=("roberta", "llama"))
    parser.add_argument("--layers", type=int, help=f"default: 24, or {LLAMA_LAYERS} of Llama")
    parser.add_argument("--width", type=int, help="default: 1024, or 4096 of Llama")
    parser.add_argument("--samples", type=int, default=100, help="roberta: examples a task")
    args = parse(parser, argv)
    {"roberta": roberta, "llama": llama}[args.part](args)


if __name__ == "__main__":
    main()
