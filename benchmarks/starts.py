"""How long OSRM's start takes: beside the published release's procedure, and at Llama's size.

    python benchmarks/starts.py roberta   # token ids -> A of 8 tasks x 48 modules, four ways
    python benchmarks/starts.py llama     # statistics -> A of 32 layers x 8 tasks, d = 4096

Weights, tokens and statistics are random: nothing is downloaded. README.md, "Which start", has
the numbers.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel

from osrm.config import EPSILON
from osrm.features import batches_by_length, collect, starts
from osrm.moments import Moment, without
from osrm.runs import peak_memory, reset_peak_memory
from osrm.subspace import random_frame

# Mean tokens of an example, both sentences and RoBERTa's special tokens together.
TOKENS = {
    "mrpc": 53,
    "qnli": 51,
    "qqp": 31,
    "rte": 70,
    "sst2": 13,
    "mnli": 40,
    "cola": 11,
    "stsb": 31,
}
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

Factors = Mapping[str, Mapping[str, Tensor]]


def machine() -> str:
    """What the numbers depend on beside the code."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
    name = models[0].partition(": ")[2] if models else platform.processor()
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch"
        f" {torch.__version__}; load averages at the start: {load}"
    )


# ----------------------------------------------------------------- roberta


def draw_examples(samples: int, generator: torch.Generator) -> dict[str, list[Tensor]]:
    """Token ids of every task's examples, not padded."""
    sigma = np.log(1 + SPREAD**2) ** 0.5
    found = {}
    for task, mean in TOKENS.items():
        gaussian = torch.randn(samples, generator=generator, dtype=torch.float64)
        lengths = (mean * torch.exp(sigma * gaussian - sigma**2 / 2)).round().clamp(4, LONGEST)
        found[task] = [
            torch.randint(END + 1, VOCABULARY, (int(length),), generator=generator)
            for length in lengths
        ]
        for ids in found[task]:
            ids[0], ids[-1] = START, END
    return found


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
    sums = {name: torch.zeros(model.get_submodule(name).in_features) for name in modules}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            sums[name] = sums[name] + args[0].mean(dim=1).mean(dim=0)

        return record

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in modules]
    for example in examples:
        model(**padded([example], LONGEST))
    for handle in handles:
        handle.remove()
    return {name: total / len(examples) for name, total in sums.items()}


def release_starts(means: Mapping[str, Mapping[str, Tensor]], rank: int) -> Factors:
    """The release's A: the last rows of a full SVD of the other tasks' means, each module anew."""
    return {
        task: {
            name: torch.linalg.svd(
                torch.stack([each[name] for other, each in means.items() if other != task])
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
        lengths = [len(each) for each in examples]
        for batch in batches_by_length(lengths, BATCH):
            yield padded([examples[index] for index in batch], max(lengths[i] for i in batch))

    found, leaders = {}, {}
    for task, examples in data.items():
        found[task], leaders = collect(model, modules, batches(examples), "token")
    return found, leaders


def roberta(args: argparse.Namespace) -> None:
    """Both procedures in both precisions, in one process, in turn; prints a table."""
    print(machine())
    torch.manual_seed(args.seed)
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.width // 64),
        intermediate_size=4 * args.width,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    model = RobertaModel(config, add_pooling_layer=False).eval()
    data = draw_examples(args.samples, torch.Generator().manual_seed(args.seed))
    tokens = sum(len(example) for examples in data.values() for example in examples)
    print(
        f"{args.layers} layers, d = {args.width}, {len(data)} tasks x {args.samples} examples of"
        f" {tokens / len(data) / args.samples:.0f} tokens on average, rank {args.rank}"
    )
    modules = [
        f"encoder.layer.{layer}.attention.self.{part}"
        for layer in range(args.layers)
        for part in ("query", "value")
    ]
    widths = dict.fromkeys(modules, args.width)
    release_samples = args.release_samples or args.samples
    rows, errors = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        precision = str(dtype).removeprefix("torch.")
        release_means(model, modules, data["cola"][:1])  # warm up
        for procedure in args.procedures:
            if f"{procedure}-{precision}" in args.skip:
                continue
            reset_peak_memory()
            begin = time.perf_counter()
            if procedure == "ours":
                moments, leaders = our_moments(model, modules, data)
                middle = time.perf_counter()
                found = starts(
                    "analytical", [*data], widths, args.rank, 0, moments, leaders, [*data]
                )
                end = time.perf_counter()
                errors[precision] = largest_error(moments, leaders, found, args.rank)
                del moments
                scale = 1.0
            else:
                means = {
                    task: release_means(model, modules, examples[:release_samples])
                    for task, examples in data.items()
                }
                middle = time.perf_counter()
                release_starts(means, args.rank)
                end = time.perf_counter()
                scale = args.samples / release_samples
            features = (middle - begin) * scale
            rows.append((procedure, precision, features, end - middle, peak_memory()))
            print(f"{procedure}, {precision}: {features + end - middle:.1f} s", flush=True)
    ours = {precision: a + b for procedure, precision, a, b, _ in rows if procedure == "ours"}
    print()
    compared = "".join(f" / ours {precision} |" for precision in ours)
    print(f"| procedure | features, s | subspace, s | total, s |{compared} peak RSS, GiB |")
    print("|---|---:|---:|---:|" + "---:|" * (len(ours) + 1))
    for procedure, precision, features, subspace, peak in rows:
        total = features + subspace
        ratios = "".join(f" {total / each:.1f} |" for each in ours.values())
        print(
            f"| {procedure}, {precision} | {features:.1f} | {subspace:.1f} | {total:.1f} |"
            f"{ratios} {peak:.1f} |"
        )
    if release_samples != args.samples and "release" in args.procedures:
        print(
            f"\nThe release's forward passes were timed on {release_samples} examples a task and"
            f" scaled to {args.samples}, which all cost the same; all its SVDs were done."
        )
    for precision, error in errors.items():
        print(
            f"\nOurs, {precision}: energy of A against scipy's eigh in float64, largest relative"
            f" difference over the first, middle and last layer: {error:.1e}"
        )


def largest_error(
    moments: Mapping[str, Mapping[str, Moment]],
    leaders: Mapping[str, str],
    found: Factors,
    rank: int,
) -> float:
    """How far A's energy is from the sum of the smallest eigenvalues, for three layers."""
    task, names = next(iter(moments)), list(dict.fromkeys(leaders.values()))
    return max(
        relative_error({each: moments[each][name] for each in moments}, task, found[task][name])
        for name in dict.fromkeys((names[0], names[len(names) // 2], names[-1]))
    )


def relative_error(moments: Mapping[str, Moment], task: str, A: Tensor) -> float:
    """|energy of the task's A over the least possible one, by scipy's eigh, less 1|."""
    others = without(reduce(add, moments.values()), moments, task)
    second = (others.gram / others.count).numpy()
    least = scipy.linalg.eigh(second, eigvals_only=True, subset_by_index=[0, len(A) - 1]).sum()
    return abs(others.energy(A) / least - 1)


# ------------------------------------------------------------------- llama


def spectrum(d: int) -> Tensor:
    """d eigenvalues, ascending: between the points above, geometric."""
    points = SMALLEST | {share * (d - 1): value for share, value in SHARES.items()}
    places = sorted(points)
    values = np.interp(np.arange(d), places, np.log([points[place] for place in places]))
    return torch.from_numpy(np.sort(np.exp(values)))


def synthetic_moments(d: int, tasks: Sequence[str], seed: int) -> dict[str, Moment]:
    """One layer's statistics: a spectrum all tasks share, and what each has of its own.

    S = R D R + F Fᵀ. R is a reflection at a random subspace of the layer, D has the eigenvalues
    of `spectrum`, each times a factor of the task's own (lognormal, sigma 0.3), and F = R D^½ G
    has 32 gaussian columns, so that a task has directions of its own whose energy is relative to
    what is usual there.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = spectrum(d)
    mirror = random_frame(d, min(16, d), generator).T
    found = {}
    for index, task in enumerate(tasks):
        values = common * (0.3 * gaussian(d)).exp()
        scaled = values[:, None] * mirror
        # R D R = D + mirror Cᵀ + C mirrorᵀ
        C = 2 * mirror @ (mirror.T @ scaled) - 2 * scaled
        F = (common / d).sqrt()[:, None] * gaussian(d, 32)
        F = F - 2 * mirror @ (mirror.T @ F)
        data = torch.diag(values)
        data.addmm_(torch.cat([mirror, C, F], 1), torch.cat([C, mirror, F], 1).T)
        count = d + 1000 * (index + 1)
        found[task] = Moment(count, data.mul_(count))
    return found


def llama(args: argparse.Namespace) -> None:
    """All problems of a model, layer by layer; making the statistics is not timed."""
    print(machine())
    tasks = list(TOKENS)
    seconds = dict.fromkeys(args.starts, 0.0)
    peaks = dict.fromkeys(args.starts, 0.0)
    problems = args.layers * len(tasks)
    for layer in range(args.layers):
        modules = [f"layers.{layer}.self_attn.{part}_proj" for part in "qkv"]
        leaders, widths = dict.fromkeys(modules, modules[0]), dict.fromkeys(modules, args.width)
        moments = synthetic_moments(args.width, tasks, args.seed + layer)
        features = {task: dict.fromkeys(modules, moment) for task, moment in moments.items()}
        for init in args.starts:
            reset_peak_memory()
            begin = time.perf_counter()
            found = starts(init, tasks, widths, args.rank, 0, features, leaders, tasks)
            seconds[init] += time.perf_counter() - begin
            peaks[init] = max(peaks[init], peak_memory())
            if args.check and layer == 0:
                error = check(init, moments, tasks[0], found[tasks[0]][modules[0]])
                print(f"{init}: largest relative difference from scipy's eigh: {error:.1e}")
        spent = ", ".join(f"{init} {each:.1f} s" for init, each in seconds.items())
        print(f"layer {layer + 1} of {args.layers}: {spent}", flush=True)
        del moments, features
    whole = args.model_layers * len(tasks)
    print(f"\nd = {args.width}, rank {args.rank}, {len(tasks)} tasks, {problems} problems timed\n")
    print(f"| start | seconds a problem | seconds for {whole} problems | peak RSS, GiB |")
    print("|---|---:|---:|---:|")
    for init, total in seconds.items():
        scaled = "" if problems == whole else " (scaled)"
        print(
            f"| {init} | {total / problems:.2f} | {total / problems * whole:.0f}{scaled} |"
            f" {peaks[init]:.1f} |"
        )


def check(init: str, moments: Mapping[str, Moment], task: str, A: Tensor) -> float:
    """The objective that A reaches, against that of scipy's eigh: relative difference."""
    if init == "analytical":
        return relative_error(moments, task, A)
    others = without(reduce(add, moments.values()), moments, task)
    own, lower = (each.gram.numpy() / each.count for each in (moments[task], others))
    lower[np.diag_indices_from(lower)] += EPSILON * others.mean_energy
    d, rank, rows = len(lower), len(A), A.double().numpy()
    best = scipy.linalg.eigh(own, lower, eigvals_only=True, subset_by_index=[d - rank, d - 1])
    reached = np.linalg.solve(rows @ lower @ rows.T, rows @ own @ rows.T).trace()
    return abs(reached / best.sum() - 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags and run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    first = parts.add_parser("roberta", help="from token ids to A, beside the release's procedure")
    first.set_defaults(run=roberta, width=1024, layers=24)
    first.add_argument("--samples", type=int, default=100, help="examples a task")
    first.add_argument(
        "--release-samples",
        type=int,
        help="time the release's forward passes on so many examples a task, and scale",
    )
    first.add_argument("--procedures", nargs="+", default=["ours", "release"])
    first.add_argument(
        "--skip", nargs="+", default=[], metavar="PROCEDURE-DTYPE", help="e.g. release-float32"
    )
    second = parts.add_parser("llama", help="from statistics to A at d = 4096")
    second.set_defaults(run=llama, width=4096, layers=32)
    second.add_argument("--model-layers", type=int, default=32, help="layers to scale to")
    second.add_argument("--starts", nargs="+", default=["analytical", "contrastive"])
    second.add_argument("--check", action="store_true", help="compare with scipy's eigh (minutes)")
    for part in (first, second):
        part.add_argument("--layers", type=int, help=f"default {part.get_default('layers')}")
        part.add_argument("--width", type=int, help=f"default {part.get_default('width')}")
        part.add_argument("--rank", type=int, default=8)
        part.add_argument("--threads", type=int, default=2)
        part.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
