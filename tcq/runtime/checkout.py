"""Which code runs: the commit of the checkout that it is in."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """The commit of the checkout of this package, with "+" if files differ from it.

    None outside of one.
    """
    here = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        commit, changed = (
            subprocess.run([*here, *command], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for command in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no", "."))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")
