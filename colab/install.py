"""Installs tcq in a runtime that has its own jax: what is there stays as it is, only what is missing is installed.

    python colab/install.py            # --dry_run only lists

Run it from the folder of tcq.
"""

import argparse
import configparser
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = ("jax", "jaxlib", "libtpu", "numpy", "torch", "tensorflow")  # of the runtime, never exchanged


def version_of(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def missing(version: Callable[[str], str | None] = version_of) -> list[str]:
    """The requirements of tcq and its page that are not installed, or too old.

    Exits if one of them belongs to the runtime.
    """
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    found = []
    for line in (parser["options"]["install_requires"] + parser["options.extras_require"]["serve"]).split():
        requirement = Requirement(line)
        installed = version(requirement.name)
        if installed is not None and requirement.specifier.contains(installed, prereleases=True):
            continue
        if installed is not None and requirement.name in RUNTIME:
            sys.exit(
                f"tcq needs {line}, and this runtime has {installed}, which is not exchanged: choose a newer runtime, "
                f"or run pip install '{line}' yourself and restart it"
            )
        found.append(line)
    return found


def main() -> None:
    """Installs what is missing, with the versions of the runtime as constraints, and tcq without dependencies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="only list what is missing")
    dry_run = parser.parse_args().dry_run
    needed = missing()
    print("missing:", " ".join(needed) or "nothing")
    if dry_run:
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        fixed = {name: version_of(name) for name in RUNTIME}
        constraints.writelines(f"{name}=={version}\n" for name, version in fixed.items() if version)
        constraints.flush()
        if needed:
            subprocess.run([*pip, "--constraint", constraints.name, *needed], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True)


if __name__ == "__main__":
    main()
