"""Which ε? What contrastive starts meet of own and other features, and each other, from a bank.

python train_glue.py --backbone minilm --max-seq-len 64 --feature-bank bank --only-features
python reproduce/epsilon.py bank
"""

import argparse
from functools import reduce
from itertools import combinations
from operator import add
from pathlib import Path
from statistics import mean, median

import torch

from osrm.features import read_bank
from osrm.interference import overlap, relative_energy, row_space
from osrm.moments import without
from osrm.starts import Problem, draw

RANK = 8
ROWS = [("orthogonal", 0.0), ("analytical", 0.0)]
ROWS += [("contrastive", epsilon) for epsilon in (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)]


def main(directory: Path) -> None:
    """Print one row for each start: energies relative to random directions, means over layers."""
    bank = read_bank(directory)
    leaders = sorted({*next(iter(bank.values())).leaders.values()})
    print("| start | own energy | energy of the others | own / others | overlap of tasks |")
    print("|---|---:|---:|---:|---:|")
    for init, epsilon in ROWS:
        own, others, overlaps = [], [], []
        for leader in leaders:
            moments = {task: file[leader] for task, file in bank.items()}
            total, frames = reduce(add, moments.values()), []
            for seed, (task, moment) in enumerate(moments.items()):
                avoided = without(total, moments, task)
                problem = Problem(moment.data.shape[1], RANK, moment, avoided, epsilon)
                A = draw(init, problem, torch.Generator().manual_seed(seed))
                own.append(relative_energy(A, moment))
                others.append(relative_energy(A, avoided))
                frames.append(row_space(A))
            overlaps += [overlap(first, second) for first, second in combinations(frames, 2)]
        name = f"{init}, ε = {epsilon:g}" if epsilon else init
        ratio = mean(own) / mean(others)
        print(
            f"| {name} | {mean(own):.3f} | {mean(others):.3f} | {ratio:.1f}"
            f" | {median(overlaps):.3f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bank", type=Path, help="what --feature-bank wrote")
    main(parser.parse_args().bank)
