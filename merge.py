"""Merge the adapters of several tasks into one model, and score it on each of them.

python merge.py --load-model-path load_model_path.json --methods task_arithmetic ties emr
"""

import sys

from osrm.config import MergeConfig, parse
from osrm.errors import run_script


def main() -> None:
    """Read the flags, then merge."""
    config = parse(MergeConfig, __doc__)
    from osrm.commands.merge import run  # late: --help need not wait for torch

    run(config)


if __name__ == "__main__":
    sys.exit(run_script(main))
