"""What holds of the paper's claims, from the tables alone: ``python -m experiments.verdict``.

Writes `results/claims.md`: each claim of the abstract, the measure chosen for it, the numbers, and
the verdict for each network. A claim is judged for DDLR as published (Net-Trim's output set,
parallel order, no refit) and for the refits and orders that both methods are offered alike; "holds
with refit" is said of a claim that fails as published. The same tables give the same file. The
claims are in `experiments.report.claims`.
"""

import logging
from pathlib import Path

import hydra
from omegaconf import DictConfig

from experiments.configuration import CONFIG_PATH
from experiments.report.claims import report
from experiments.report.tables import MADE_BY, read_tables
from experiments.runs.records import write_whole

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="verdict")
def main(cfg: DictConfig) -> None:
    results = Path(cfg.results_dir)
    tables = read_tables(results)
    if "sweeps" not in tables:
        raise FileNotFoundError(
            f"there is no {results / 'sweeps.csv'}; make it with {MADE_BY['sweeps']}"
        )
    text = report(tables)
    write_whole(results / "claims.md", lambda scratch: scratch.write_text(text, encoding="utf-8"))
    log.info("%s", results / "claims.md")


if __name__ == "__main__":
    main()
