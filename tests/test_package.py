"""What `pip install .` installs: the code, the embedded set's lists, and nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_an_installation_holds_the_package_alone(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT / "osrm", source / "osrm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    install = [sys.executable, "-m", "pip", "install", *offline, "--target", target, source]
    subprocess.run(install, check=True)
    expected = {
        path.relative_to(ROOT)
        for path in (ROOT / "osrm").rglob("*")
        if path.suffix == ".py" or (path.parts[-2:-1] == ("embedded",) and path.suffix == ".txt")
    }
    installed = {
        path.relative_to(target)
        for path in target.rglob("*")
        if path.is_file() and "dist-info" not in str(path) and path.suffix != ".pyc"
    }
    commands = {Path("bin/osrm-train"), Path("bin/osrm-merge")}
    assert installed == expected | commands
    for name in commands:
        help = [sys.executable, target / name, "--help"]
        shown = subprocess.run(
            help, env={"PYTHONPATH": target}, capture_output=True, text=True, check=True
        ).stdout
        assert shown.startswith(f"usage: {name.name} ") and "--backbone" in shown
    code = "import osrm; print(osrm.__file__, osrm.load_merged.__name__)"
    command = [
        sys.executable,
        "-I",
        "-c",
        f"import sys; sys.path.insert(0, {str(target)!r}); {code}",
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == f"{target}/osrm/__init__.py load_merged\n"
