"""Everything behind the tables, figures and claims of this repository, by one command.

python -m experiments.paper
python -m experiments.paper "sweep=['device=cuda','launcher=joblib']"

Runs the experiments of `conf/paper.yaml` one after the other, takes the measurements whose tables
are missing, then collects, plots and judges. It can be interrupted: the same command goes on, also
on another machine that has the tables alone. What fails is named at the end, with exit code 1.
"""

import logging
import shlex
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import hydra
import pandas as pd
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from tqdm import tqdm

from experiments.configuration import CONFIG_PATH
from experiments.runs.records import ONE_TOLERANCE
from experiments.runs.sweeping import duration
from experiments.runs.units import FAILED, FINISHED, run_key, state
from experiments.status import expanded, planned, seconds_left

log = logging.getLogger(__name__)

_PATHS = ("data_dir", "results_dir", "checkpoint_dir", "record_dir", "output_dir", "cache_dir")
_SECONDS_A_LOOK = 5
_SECONDS_A_LINE = 300  # where there is no terminal to keep one line up to date on
# An interrupt from the terminal reaches the command that runs, too; one sent to this process alone
# is passed on after this time.
_SECONDS_TO_END = 5


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="paper")
def main(cfg: DictConfig) -> None:
    try:
        failed = [*_sweeps(cfg), *_measurements(cfg), *_conclusions(cfg)]
    except KeyboardInterrupt:
        log.info("interrupted; the same command goes on from here")
        sys.exit(130)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command does what is left")


def _sweeps(cfg: DictConfig) -> list[str]:
    """Run the experiments that are not finished; return those that failed."""
    log.info("reading %d experiments", len(cfg.experiments))
    GlobalHydra.instance().clear()  # it composes for one command at a time; this one's is done
    sweeps = {name: _sweep(cfg, name) for name in cfg.experiments}
    runs = {name: _runs(overrides) for name, overrides in sweeps.items()}
    progress = Progress({key: run for each in runs.values() for key, run in each.items()})
    log.info("%s", progress.line())
    failed = []
    for name, overrides in sweeps.items():
        if not cfg.rerun and Progress(runs[name]).finished():
            log.info("%s: finished already", name)
            continue
        with progress.shown(name):
            ended = _command("compress", "-m", *overrides, "verbosity=quiet")
        # After each, so that the tables are up to date wherever the command is interrupted.
        collected = _command("collect", *_paths(cfg))
        if ended or collected:
            failed.append(name)
        log.info("%s: %s; %s", name, "failed" if ended else "done", progress.line())
    return failed


def _measurements(cfg: DictConfig) -> list[str]:
    failed = []
    for name in cfg.measurements:
        table = Path(cfg.results_dir) / f"{name}.csv"
        if table.is_file() and not cfg.rerun:
            log.info("%s: %s is there already", name, table)
        elif _command(name, *_paths(cfg)):
            failed.append(name)
    return failed


def _conclusions(cfg: DictConfig) -> list[str]:
    return [name for name in cfg.conclusions if _command(name, *_paths(cfg))]


def runs_of_paper(rows: pd.DataFrame) -> dict[str, DictConfig]:
    """The runs of `conf/paper.yaml` that rows of `sweeps.csv` are of, by their keys there.

    To compose the configs of all takes minutes. So of the others only those are composed whose
    overrides say nothing else than one of the rows.
    """
    runs: dict[str, DictConfig] = {}
    said = [_said_by(row) for row in rows.to_dict("records")]
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        for experiment in compose("paper").experiments:
            _, jobs = expanded(shlex.split(experiment))
            for job in jobs:
                given = dict(each.lstrip("+").split("=", 1) for each in job)
                if any(all(given.get(key, of) == of for key, of in row.items()) for row in said):
                    run = compose("compress", overrides=job)
                    runs[run_key(run)] = run
    return {key: run for key, run in runs.items() if key in set(rows["run"])}


def _said_by(row: dict) -> dict[str, str]:
    """What overrides may say of a row, in their words."""
    goal = row["goal"].partition("_by_")[0]
    key = "method.relative_tolerance" if goal == ONE_TOLERANCE else f"goal.{goal}"
    return {
        **{name: row[name] for name in ("dataset", "method")},
        "seed": str(row["seed"]),
        "method.refit": row["refit"],
        "method.order": row["order"],
        key: f"{row['wanted']:g}",
    }


class Progress:
    """How far a set of runs is, read off their records and tables."""

    def __init__(self, runs: Mapping[str, DictConfig]):
        self.runs = runs
        self.found: dict[str, tuple[str, dict | None]] = {}

    def look(self) -> None:
        """Look again for the runs that were not finished when last looked at."""
        for key, cfg in self.runs.items():
            if self.found.get(key, ("",))[0] != FINISHED:
                self.found[key] = state(cfg, key)

    def finished(self) -> bool:
        self.look()
        return all(how == FINISHED for how, _ in self.found.values())

    def line(self) -> str:
        """Finished of all runs, failed ones, and the computing time of those left."""
        self.look()
        counts = Counter(how for how, _ in self.found.values())
        text = f"{counts[FINISHED]} of {len(self.runs)} runs finished"
        if counts[FAILED]:
            text += f", {counts[FAILED]} failed"
        seconds = seconds_left(self.runs, self.found)
        if seconds:
            text += f", about {duration(seconds)} left, one run after the other"
        return text

    @contextmanager
    def shown(self, name: str) -> Iterator[None]:
        """Keep a line about all runs up to date while a command runs."""
        over = threading.Event()
        thread = threading.Thread(target=self._show, args=(name, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _show(self, name: str, over: threading.Event) -> None:
        if sys.stderr.isatty():
            with tqdm(bar_format="{desc}", leave=False) as line:
                while True:
                    line.set_description_str(f"{self.line()}; now {name}")
                    if over.wait(_SECONDS_A_LOOK):
                        return
        while not over.wait(_SECONDS_A_LINE):
            log.info("%s; now %s", self.line(), name)


def _paths(cfg: DictConfig) -> list[str]:
    return [f"{name}={cfg[name]}" for name in _PATHS]


def _sweep(cfg: DictConfig, experiment: str) -> list[str]:
    """The arguments of an experiment's sweep."""
    own = ["finished_in=tables", f"rerun={str(cfg.rerun).lower()}"]
    return [*shlex.split(experiment), *own, *_paths(cfg), *cfg.sweep]


def _runs(overrides: list[str]) -> dict[str, DictConfig]:
    return {run_key(run): run for run in planned(overrides)}


def _command(name: str, *arguments: str) -> int:
    """Run another command of this folder to its end, and return its exit code."""
    process = subprocess.Popen([sys.executable, "-m", f"experiments.{name}", *arguments])
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
        raise


if __name__ == "__main__":
    main()
