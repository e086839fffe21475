"""Train one LoRA adapter a GLUE task, from a start of your choice: see --help and README.md."""

import sys

from osrm.cli import osrm_train
from osrm.cli import train_glue as main  # noqa: F401

if __name__ == "__main__":
    sys.exit(osrm_train())
