"""Merge the adapters of several tasks into one model, and score it: see --help and README.md."""

import sys

from osrm.cli import merge as main
from osrm.errors import run_script

if __name__ == "__main__":
    sys.exit(run_script(main))
