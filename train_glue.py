"""Train one LoRA adapter a GLUE task, from a start of your choice, ready to be merged.

python train_glue.py --backbone minilm --tasks mrpc stsb --init contrastive --epochs 3 --lr 2e-3
"""

import sys

from osrm.config import TrainConfig, parse
from osrm.errors import run_script


def main() -> None:
    """Read the flags, then train."""
    config = parse(TrainConfig, __doc__)
    from osrm.commands.train import train  # late: --help need not wait for torch

    train(config)


if __name__ == "__main__":
    sys.exit(run_script(main))
