"""What sharing work and running side by side save in a sweep: wall-clock times of whole commands.

python -m experiments.benchmark_sweeps

Each case starts from empty folders, as a user's first sweep does, on trained networks.
Times hold for an otherwise idle machine.
"""

import itertools
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hydra
import pandas as pd
from omegaconf import DictConfig

from experiments.configuration import CONFIG_PATH, REPOSITORY, cores
from experiments.runs.records import read_records, write_whole

log = logging.getLogger(__name__)

METHODS = ("ddlr", "nettrim")
CONSTRAINTS = ("nettrim", "hinge")
TOLERANCES = (0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5)


def sharing(cfg: DictConfig) -> list[dict]:
    """8 tolerances x 4 methods (two norms, two output sets): 32 commands against one sweep."""
    settings = [
        "model=lenet_300_100",
        f"calibration_samples={cfg.sharing.calibration_samples}",
        f"method.tolerance={cfg.sharing.tolerance}",
    ]
    grid = {
        "method": METHODS,
        "method.constraint": CONSTRAINTS,
        "method.relative_tolerance": TOLERANCES,
    }
    runs = [
        [f"{key}={value}" for key, value in zip(grid, values, strict=True)]
        for values in itertools.product(*grid.values())
    ]
    with tempfile.TemporaryDirectory() as folder:
        separate = sum(
            _seconds(Path(folder), cfg, *settings, *run, "cache.enabled=false") for run in runs
        )
        solving = _solving_seconds(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        swept = [f"{key}={','.join(map(str, values))}" for key, values in grid.items()]
        shared = _seconds(Path(folder), cfg, "-m", *settings, *swept)
    return [
        _row("sharing", f"{len(runs)} separate runs", "wall_clock", separate, "s"),
        _row("sharing", f"{len(runs)} separate runs", "of it in the methods", solving, "s"),
        _row("sharing", f"one sweep of {len(runs)} runs", "wall_clock", shared, "s"),
        _row("sharing", "one sweep / separate runs", "wall_clock", shared / separate, "ratio")
        | {"target": "<= 0.5", "met": "yes" if shared / separate <= 0.5 else "no"},
    ]


def launchers(cfg: DictConfig) -> list[dict]:
    """A sweep of 16 runs: one after the other on two threads, and two at once on one each.

    With few samples and with more: the larger the matrix products, the more use they make of a
    second thread.
    """
    grid = [
        f"method={','.join(METHODS)}",
        f"method.relative_tolerance={','.join(map(str, TOLERANCES))}",
    ]
    cases = {
        "local, 2 threads": ["launcher=local", "threads=2"],
        "joblib, 2 x 1 thread": ["launcher=joblib", "launcher.jobs=2", "threads=1"],
    }
    rows = []
    for setting in cfg.launchers:
        network = [f"{key}={value}" for key, value in setting.items()]
        name = f"{setting.model}, {setting.calibration_samples} samples"
        seconds = {}
        for case, overrides in cases.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds[case] = _seconds(Path(folder), cfg, "-m", *network, *grid, *overrides)
            rows.append(_row("launchers", f"{name}, {case}", "wall_clock", seconds[case], "s"))
        local, joblib = seconds.values()
        case = f"{name}, joblib over local"
        rows.append(
            _row("launchers", case, "speedup", local / joblib, "ratio")
            | {"target": ">= 1.25", "met": "yes" if local / joblib >= 1.25 else "no"}
        )
    return rows


PARTS = {"sharing": sharing, "launchers": launchers}


def _seconds(folder: Path, cfg: DictConfig, *overrides: str) -> float:
    """Run the command to its end, and time it."""
    started = time.perf_counter()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.compress",
            *overrides,
            f"results_dir={folder}/results",
            f"output_dir={folder}/outputs",
            f"checkpoint_dir={cfg.checkpoint_dir}",
            f"data_dir={cfg.data_dir}",
            "tracking=none",
            "verbosity=quiet",
        ],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=True,
    )
    return time.perf_counter() - started


def _solving_seconds(folder: Path) -> float:
    return sum(record["row"]["seconds"] for record in read_records(folder / "results/records"))


def _row(part: str, case: str, quantity: str, value: float, unit: str) -> dict:
    return {
        "part": part,
        "case": case,
        "quantity": quantity,
        "value": round(value, 3),
        "unit": unit,
    }


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="benchmark_sweeps")
def main(cfg: DictConfig) -> None:
    if cores() < 2:
        log.warning("this machine has one core: two processes cannot be faster than one")
    table = pd.DataFrame([row for part in cfg.parts for row in PARTS[part](cfg)])
    path = Path(cfg.results_dir) / "benchmark_sweeps.csv"
    if path.is_file():
        earlier = pd.read_csv(path)
        table = pd.concat([earlier[~earlier["part"].isin(cfg.parts)], table], ignore_index=True)
    write_whole(path, lambda scratch: table.to_csv(scratch, index=False))
    log.info("%s:\n%s", path, table.fillna("").to_string(index=False))


if __name__ == "__main__":
    main()
