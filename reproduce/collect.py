"""Keep the results of one run of a study: scores, interference and costs, and the predictions.

python reproduce/collect.py load_model_path.json merged/ results/<study>/<run>/<seed>.json \
    results/<study>/<run>/<seed>.parquet
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from datetime import date
from pathlib import Path
from typing import Any

TRAINING = ("init", "features", "rank", "alpha", "block", "freeze", "max_num_samples", "norm_match")
COSTS = ("kept", "merge_seconds", "merge_peak_gib", "size_mib", "condition")
MATRICES = ("shift", "energy_before", "overlap", "sign_conflict")
VECTORS = ("drift", "kept_in_start", "norm")


def rounded(value: Any) -> Any:
    """Every float to 4 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list) else value


def collect(directories: dict[str, str], merged: Path, run: str, seed: int) -> dict[str, Any]:
    """The record of one run, from its run directories {task: path} and its merge."""
    results = json.loads((merged / "results.json").read_text())
    interference = json.loads((merged / "interference.json").read_text())
    args, metrics = (
        {task: json.loads((Path(path) / file).read_text()) for task, path in directories.items()}
        for file in ("args.json", "metrics.json")
    )
    first = next(iter(args.values()))
    training = {name: first[name] for name in TRAINING}
    if not first["load_model_path"]:  # a transform has these flags, too, but trains nothing
        training |= {
            "lr": {task: run["lr"] for task, run in args.items()},
            "epochs": {task: run["epochs"] for task, run in args.items()},
            "examples": {task: run["data"]["train"]["examples"] for task, run in args.items()},
            "seconds": sum(values["train_runtime"] for values in metrics.values()),
        }
    layers = {name: interference[name]["modules"] for name in ("shift", "energy_before")}
    return {
        "run": run,
        "seed": seed,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "environment": results["environment"],
        "backbone": results["backbone"],
        "tasks": list(directories),
        "training": training,
        "transform": first["transform"] if first["load_model_path"] else None,
        "evaluation": results["evaluation"],
        "rows": [
            {
                name: row[name]
                for name in ("name", "knobs", "scores", "average", "normalised_average", *COSTS)
                if name in row
            }
            for row in results["rows"]
        ],
        "search": results["search"],
        "interference": {
            **{name: interference[name]["overall"] for name in (*MATRICES, *VECTORS)},
            "modules": interference["modules"],
            "layers": layers,
        },
    }


def main() -> None:
    """Write the record and the predictions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("load_model_path", type=Path)
    parser.add_argument("merged", type=Path)
    parser.add_argument("json", type=Path)
    parser.add_argument("parquet", type=Path)
    given = parser.parse_args()
    directories = json.loads(given.load_model_path.read_text())
    record = collect(directories, given.merged, given.json.parent.name, int(given.json.stem))
    shutil.copyfile(given.merged / "predictions.parquet", given.parquet)
    given.json.write_text(json.dumps(rounded(record)) + "\n")


if __name__ == "__main__":
    main()
