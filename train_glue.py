"""Train one LoRA adapter a GLUE task, from a start of your choice: see --help and README.md."""

import sys

from osrm.cli import train_glue as main
from osrm.errors import run_script

if __name__ == "__main__":
    sys.exit(run_script(main))
