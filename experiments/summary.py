"""The runs of a folder of results on one screen: ``python -m experiments.summary``.

Reads `sweeps.csv` alone, and says what else there is to look at. Needs neither torch nor a network.
"""

from pathlib import Path

import hydra
import pandas as pd
from omegaconf import DictConfig

from experiments.configuration import CONFIG_PATH
from experiments.report.tables import (
    MADE_BY,
    METHOD_TITLES,
    at_commonest_samples_and_ridge,
    at_one_tolerance,
    in_order,
    read_table,
)

_WIDTH = 13  # of a column
_FILES = {
    "figures/frontier_weights.png": "accuracy against size, the figure to begin with",
    "figures/frontier_bytes.png": "the same in bytes",
    "figures/layers.png": "what is left of each layer",
    "figures/bound.png": "errors as promised and as measured",
    "figures/equal_drop.png": "the smallest networks within a drop of accuracy",
    "sizes.csv": "the same as a table",
    "sweeps.csv": "one row per run",
    "layers.csv": "one row per layer of a run",
}
_REFIT_WORDS = {"none": "", "layer": "refit", "network": "network refit"}


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="summary")
def main(cfg: DictConfig) -> None:
    results = Path(cfg.results_dir)
    path = results / "sweeps.csv"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; make it with {MADE_BY['sweeps']}")
    print(f"\n{summary(read_table(path))}\n")
    for file, what in _FILES.items():
        if (results / file).is_file():
            print(f"{results / file}: {what}")


def summary(sweeps: pd.DataFrame) -> str:
    """One block per network: weights kept and test accuracy by method and tolerance, seed means.

    The runs have one tolerance for all layers, and the calibration samples and ridge of most.
    """
    networks = at_commonest_samples_and_ridge(at_one_tolerance(sweeps)).groupby(
        ["dataset", "model"]
    )
    return "\n\n".join(_block(dataset, model, rows) for (dataset, model), rows in networks)


def _block(dataset: str, model: str, rows: pd.DataFrame) -> str:
    tolerances = sorted(rows["wanted"].unique())
    lines = {}
    for method in in_order(rows["method"], METHOD_TITLES):
        of_method = rows[rows["method"] == method]
        for refit in in_order(of_method["refit"], _REFIT_WORDS):
            of_refit = of_method[of_method["refit"] == refit]
            for (constraint, order), variant in of_refit.groupby(["constraint", "order"]):
                words = [method, _REFIT_WORDS[refit], order if order == "cascade" else ""]
                if of_method["constraint"].nunique() > 1:
                    words.append(constraint)
                lines[" ".join(filter(None, words))] = _cells(variant, tolerances)
    margin = max(map(len, lines))
    return "\n".join(
        [
            f"{model} on {dataset}: {rows['parameters_dense'].iloc[0]} weights, test accuracy "
            f"{rows['accuracy_dense'].mean():.1f} %",
            "Weights kept / test accuracy, both in %, for an error of each layer of at most",
            " " * margin + "".join(f"{tolerance:>{_WIDTH}g}" for tolerance in tolerances),
            *(f"{name:{margin}}{cells}" for name, cells in lines.items()),
        ]
    )


def _cells(rows: pd.DataFrame, tolerances: list[float]) -> str:
    means = rows.groupby("wanted")[["kept_fraction", "accuracy"]].mean()
    cells = {
        tolerance: f"{100 * mean.kept_fraction:.1f} / {mean.accuracy:.1f}"
        for tolerance, mean in means.iterrows()
    }
    return "".join(f"{cells.get(tolerance, '-'):>{_WIDTH}}" for tolerance in tolerances)


if __name__ == "__main__":
    main()
