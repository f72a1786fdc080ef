"""Offline runs of wandb, read back as wandb itself reads them."""

import json
import subprocess
import sys
from pathlib import Path


def entries(folder: Path) -> list[dict]:
    """What was written to a run, in its order."""
    wandb = Path(sys.executable).with_name("wandb")
    printed = subprocess.run(
        [wandb, "leet", "inspect", "--json", folder], capture_output=True, text=True, check=True
    ).stdout
    return [json.loads(line) for line in printed.splitlines()]
