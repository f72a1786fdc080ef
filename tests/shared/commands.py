"""Commands of the comparison, run as a user runs them."""

import subprocess
import sys
from pathlib import Path

from patience import PATIENCE

DIGITS = ("dataset=digits", "model=mlp_digits")


def command(name: str, *overrides: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a command in a folder that is not the repository, writing only below it."""
    return subprocess.run(
        [
            *(sys.executable, "-m", f"experiments.{name}"),
            *overrides,
            *(f"results_dir={folder}/results", f"output_dir={folder}/outputs"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
