"""Net-Trim as reimplemented here, set against the curve that its authors report."""

import numpy as np
import pandas as pd

from experiments.report.curves import at_sizes
from experiments.report.markdown import NOT_MEASURED, markdown_table, spread
from experiments.report.tables import at_commonest_samples_and_ridge, with_all_seeds

# Net-Trim on 784-300-1000-100-10: pruned fraction and test accuracy (%), as its authors report.
# Aghasi et al. (2020), arXiv 1806.06457; whether fine-tuned is not certain.
PUBLISHED = ((0.845, 98.55), (0.88, 98.40), (0.935, 98.07), (0.97, 96.52))
REPRODUCED_WITHIN = 0.3  # points below the published accuracy
_AFTERWARDS = {"none": "as solved", "layer": "refit", "finetuned": "fine-tuned"}


def against_published(sweeps: pd.DataFrame, finetuned: pd.DataFrame) -> str:
    """Net-Trim's reimplementation, in its authors' protocol, against the curve they report."""
    title = "## Net-Trim's reimplementation against its published curve"
    measure = (
        "784-300-1000-100-10, Net-Trim in its authors' protocol (the bias penalised, cascade, only "
        "the first layer with a tolerance, 20 000 of their training samples), as solved, and "
        "fine-tuned with labels afterwards. Test accuracy at the published pruned fractions, "
        "interpolated in the logarithm of the kept one, seed by seed. "
        f"Reproduced: not more than {REPRODUCED_WITHIN:g} points below on average. Whether the "
        "published networks were fine-tuned is not certain."
    )
    rows = pd.concat([sweeps, finetuned])
    rows = rows[(rows["model"] == "fc_nettrim") & (rows["method"] == "nettrim_protocol")]
    rows = with_all_seeds(at_commonest_samples_and_ridge(rows))
    lines = [
        line
        for refit, of_refit in rows.groupby("refit", sort=False)
        for line in _lines(of_refit, _AFTERWARDS[refit])
    ]
    header = ["variant", "pruned (%)", "published (%)", "here (%)", "difference", "reproduced"]
    body = markdown_table(header, lines) if lines else f"{NOT_MEASURED.capitalize()}."
    return f"{title}\n\n{measure}\n\n{body}"


def _lines(rows: pd.DataFrame, variant: str) -> list[list[str]]:
    lines = []
    for pruned, published in PUBLISHED:
        here = np.array(
            [at_sizes(of_seed, "accuracy", 1 - pruned) for _, of_seed in rows.groupby("seed")]
        )
        cells = [variant, f"{100 * pruned:.1f}", f"{published:.2f}"]
        if np.isnan(here).any():
            lines.append([*cells, "outside the measured sizes", "", NOT_MEASURED])
            continue
        difference = here - published
        reproduced = difference.mean() >= -REPRODUCED_WITHIN
        lines.append(
            [
                *cells,
                spread(here.mean(), here.min(), here.max(), 2),
                spread(difference.mean(), difference.min(), difference.max(), 2),
                "yes" if reproduced else "no",
            ]
        )
    return lines
