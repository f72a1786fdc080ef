"""What happens around the runs of a sweep: checks before it, one line during it, a report after it.

Each run notes its outcome in a file below the sweep's folder, which the process that started the
sweep reads. So all of it works alike whichever launcher runs the jobs, and wherever.
"""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from experiments.records import write_json
from experiments.tracking import TrackingError, check_tracking, log_sweep
from experiments.units import FAILED, FINISHED, read_record

log = logging.getLogger(__name__)

# Launcher to the plugin it needs and the extra that brings it.
_PLUGINS = {
    "joblib": ("hydra_joblib_launcher", "joblib"),
    "submitit_local": ("hydra_submitit_launcher", "submitit"),
    "submitit_slurm": ("hydra_submitit_launcher", "submitit"),
    "slurm": ("hydra_submitit_launcher", "submitit"),
    "ray": ("hydra_ray_launcher", "ray"),
}
VERBOSITIES = ("quiet", "normal", "verbose")
_SECONDS_A_LOOK = 0.5


def command(main: Callable[[], None]) -> None:
    """Run a Hydra command that may be a sweep, and report on the sweep when it is over.

    Exits with 1 if a run failed. Ctrl-C and a launcher's own errors pass through after the report.
    """
    check_launcher(sys.argv[1:])
    try:
        main()
    finally:
        failed = _watched.pop().end() if _watched else False
    if failed:
        sys.exit(1)


def check_launcher(overrides: list[str]) -> None:
    """Exit with the extra to install if the launcher on a command line is not there."""
    for override in overrides:
        key, _, choice = override.partition("=")
        if key in ("launcher", "hydra/launcher") and choice in _PLUGINS:
            plugin, extra = _PLUGINS[choice]
            if find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{plugin}") is None:
                sys.exit(
                    f"launcher={choice} is not installed; install it with\n"
                    f'  pip install -c constraints.txt -e ".[{extra}]"'
                )


def expand(overrides: list[str], params: dict[str, str] | None = None) -> list[list[str]]:
    """The runs of a sweep, each as its overrides, in the order in which Hydra numbers them."""
    texts = [*(f"{key}={value}" for key, value in (params or {}).items()), *overrides]
    parsed = OverridesParser.create().parse_overrides(texts)
    return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]


def group_of(experiment_name: str, hydra_config: DictConfig) -> str:
    """One group a sweep; a single run is a group of its own."""
    multirun = hydra_config.mode == RunMode.MULTIRUN
    folder = Path(hydra_config.sweep.dir if multirun else hydra_config.run.dir)
    return f"{experiment_name}-{folder.name}"


def note_outcome(hydra_config: DictConfig, name: str, state: str, **about) -> None:
    """Leave word of how a job ended, for the process that started the sweep."""
    if hydra_config.mode == RunMode.MULTIRUN:
        path = _outcomes(hydra_config.sweep.dir) / f"{hydra_config.job.num}.json"
        overrides = list(hydra_config.overrides.task)
        write_json(path, {"name": name, "state": state, "overrides": overrides, **about})


def set_verbosity(verbosity: str) -> None:
    """How much the console says; the log files keep everything."""
    if verbosity not in VERBOSITIES:
        raise ValueError(f"verbosity is {verbosity!r}; choose one of {VERBOSITIES}")
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setLevel(logging.WARNING if verbosity == "quiet" else logging.INFO)
            handler.filters.clear()
            if verbosity == "normal":
                handler.addFilter(_not_a_line_a_layer)


def _not_a_line_a_layer(record: logging.LogRecord) -> bool:
    return not record.name.startswith("ddlr") or record.levelno >= logging.WARNING


@contextmanager
def layer_bar(cfg: DictConfig, name: str, layers: int) -> Iterator[Callable | None]:
    """A bar over a run's layers, for a run that has the terminal to itself; else None."""
    if cfg.verbosity == "quiet" or cfg.launcher.name != "local" or not sys.stderr.isatty():
        yield None
        return
    with (
        logging_redirect_tqdm(),
        tqdm(total=layers, desc=name, unit="layer", position=1, leave=False) as bar,
    ):
        yield lambda report: bar.update()


def _outcomes(sweep_dir: str | Path) -> Path:
    return Path(sweep_dir) / "outcomes"


class SweepCallback(Callback):
    """Begins the watch over a sweep. Without state of its own, since launchers pickle it."""

    def on_run_start(self, config: DictConfig, **kwargs) -> None:
        _check(config)

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        _check(config)
        if config.verbosity == "quiet":
            for name in ("hydra", "hydra_plugins"):
                logging.getLogger(name).setLevel(logging.WARNING)
        _watched.append(Watch(config))


class Watch:
    """A sweep, seen from the process that started it."""

    def __init__(self, config: DictConfig):
        self.config = config
        self.folder = _outcomes(config.hydra.sweep.dir)
        params = OmegaConf.to_container(config.hydra.sweeper).get("params")
        self.total = len(expand(list(config.hydra.overrides.task), params))
        self.started = time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._show, daemon=True)
        self.thread.start()

    def _show(self) -> None:
        if self.config.verbosity == "quiet" or not sys.stderr.isatty():
            return
        with tqdm(bar_format="{desc}", position=0, leave=True) as line:
            while True:
                over = self.over.wait(_SECONDS_A_LOOK)
                elapsed = time.monotonic() - self.started
                line.set_description_str(progress_line(self._read(), self.total, elapsed))
                if over:
                    return

    def _read(self) -> list[dict]:
        outcomes = (json.loads(path.read_text()) for path in self.folder.glob("*.json"))
        return sorted(outcomes, key=lambda outcome: outcome["name"])

    def end(self) -> bool:
        """Report on the sweep; whether a run of it failed."""
        self.over.set()
        self.thread.join()
        outcomes = self._read()
        failed = [outcome for outcome in outcomes if outcome["state"] == FAILED]
        missing = self.total - len(outcomes)
        if self.config.verbosity != "quiet" or failed or missing:
            _say(
                f"sweep: {len(outcomes) - len(failed)} runs finished, {len(failed)} failed, "
                f"{missing} not done"
            )
        for outcome in failed:
            _say(f"failed: {outcome['name']}\n  {outcome['cause']}")
            _say(f"  config: {' '.join(outcome['overrides'])}")
        if failed or missing:
            _say("The same command does what is left; finished runs are kept.")
        if any(not outcome.get("skipped") for outcome in outcomes):
            self._log(outcomes)
        return bool(failed)

    def _log(self, outcomes: list[dict]) -> None:
        folder = Path(self.config.record_dir)
        keys = {outcome["key"] for outcome in outcomes if outcome["state"] == FINISHED}
        records = (read_record(folder / f"{key}.json") for key in sorted(keys))
        rows = [record["row"] for record in records if record and record["state"] == FINISHED]
        group = group_of(self.config.experiment_name, self.config.hydra)
        overrides = list(self.config.hydra.overrides.task)
        try:
            log_sweep(self.config.tracking, group=group, config={"sweep": overrides}, rows=rows)
        except Exception as error:  # it mirrors what is on disk
            log.warning("the sweep was not logged: %s", error)


# The sweep that this process has started, if any.
_watched: list[Watch] = []


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def progress_line(outcomes: list[dict], total: int, elapsed: float) -> str:
    """Done, failed, remaining and the time left, from the runs that were not merely found done."""
    failed = sum(outcome["state"] == FAILED for outcome in outcomes)
    computed = sum(not outcome.get("skipped") for outcome in outcomes)
    remaining = total - len(outcomes)
    line = f"sweep: {len(outcomes) - failed} done, {failed} failed, {remaining} remaining"
    if remaining and computed:
        line += f", about {duration(elapsed / computed * remaining)} left"
    return line


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _check(config: DictConfig) -> None:
    try:
        check_tracking(config.tracking)
    except TrackingError as error:
        # Hydra turns other exceptions of a callback into warnings.
        sys.exit(str(error))
