"""Merge the adapters of several tasks into one model, and score it: see --help and README.md."""

import sys

from osrm.cli import merge as main  # noqa: F401
from osrm.cli import osrm_merge

if __name__ == "__main__":
    sys.exit(osrm_merge())
