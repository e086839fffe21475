"""The choice of ε: energies of own and other features along contrastive starts, from a bank.

python train_glue.py --backbone minilm --max-seq-len 64 --feature-bank bank --only-features
python reproduce/epsilon.py bank
"""

import argparse
from itertools import combinations
from pathlib import Path
from statistics import mean, median

import torch

from osrm.bank import read_bank
from osrm.interference import overlap, relative_energy, row_space
from osrm.moments import own_and_others
from osrm.starts import Problem, draw

RANK = 8
ROWS = [("orthogonal", 0.0), ("analytical", 0.0)]
ROWS += [("contrastive", epsilon) for epsilon in (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)]


def main(directory: Path) -> None:
    """Print a row per start: energies relative to random directions, means over the layers."""
    bank = read_bank(directory)
    leaders = sorted({*next(iter(bank.values())).leaders.values()})
    print("| start | own energy | energy of the others | own / others | overlap of tasks |")
    print("|---|---:|---:|---:|---:|")
    for init, epsilon in ROWS:
        own, others, overlaps = [], [], []
        for leader in leaders:
            moments = {task: file[leader] for task, file in bank.items()}
            frames = []
            statistics = own_and_others(moments, moments, moments)
            for seed, (_, moment, avoided) in enumerate(statistics):
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
