"""Measure the solvers: ``python -m experiments.benchmark``. Writes `results/benchmark.csv`.

Everything is measured against something in the same run: cone solvers at equal certified accuracy,
the plain alternating direction method, or *pairs*, see `experiments.benchmarks.timing`. The
measurements are in `experiments.benchmarks`; what is aimed at, and the figures, are read from the
table in `experiments.report`.
"""

import logging
import platform
from collections.abc import Callable
from pathlib import Path

import hydra
import matplotlib
import pandas as pd
import torch
from omegaconf import DictConfig

from experiments.benchmarks.against_cone_solvers import against_cone_solvers
from experiments.benchmarks.memory import memory
from experiments.benchmarks.one_layer import one_layer, sum_of_structures, tolerance_path
from experiments.benchmarks.ranks import rank_search
from experiments.benchmarks.shapes import growth, large_layers
from experiments.benchmarks.sparse_layers import sparse_layers
from experiments.configuration import CONFIG_PATH
from experiments.report.figures_benchmark import FIGURES
from experiments.report.solver_targets import solver_targets
from experiments.report.style import save
from experiments.runs.records import write_whole
from experiments.training import choose_device

log = logging.getLogger(__name__)

PARTS: dict[str, Callable[[DictConfig, torch.device], list[dict]]] = {
    "layer": one_layer,
    "sum": sum_of_structures,
    "path": tolerance_path,
    "lowest_rank": rank_search,
    "growth": growth,
    "memory": memory,
    "reference": against_cone_solvers,
    "sparse": sparse_layers,
    "large": large_layers,
}


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="benchmark")
def main(cfg: DictConfig) -> None:
    matplotlib.use("Agg")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    unknown = set(cfg.parts) - set(PARTS)
    if unknown:
        raise ValueError(f"parts has {sorted(unknown)}; choose among {list(PARTS)}")
    device = choose_device(cfg.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    common = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    path = Path(cfg.results_dir) / "benchmark.csv"
    for part in cfg.parts:
        rows = [{"part": part, **row, **common} for row in PARTS[part](cfg, device)]
        _replace_part(path, part, pd.DataFrame(rows))
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path} to read; name parts to measure")
    table = pd.read_csv(path)
    targets = solver_targets(table)
    text = targets.to_string(index=False, max_colwidth=None)
    log.info("%s\n%s", path, text)
    write_whole(
        path.with_name("benchmark_targets.csv"),
        lambda scratch: targets.to_csv(scratch, index=False),
    )
    for name, (part, draw) in FIGURES.items():
        if part in set(table["part"]):
            save(draw(table), path.parent / "figures" / f"{name}.png")


def _replace_part(path: Path, part: str, rows: pd.DataFrame) -> None:
    """Put one part's rows into the table in place of its earlier ones."""
    if path.is_file():
        earlier = pd.read_csv(path)
        rows = pd.concat([earlier[earlier["part"] != part], rows], ignore_index=True)
    order = list(PARTS)
    rows = rows.sort_values("part", key=lambda parts: parts.map(order.index), kind="stable")
    write_whole(path, lambda scratch: rows.to_csv(scratch, index=False, float_format="%.6g"))


if __name__ == "__main__":
    main()
