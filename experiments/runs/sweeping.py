"""What happens around the runs of a sweep: checks before it, one line during it, a report after it.

Each run notes its outcome in a file below the sweep's folder, which the process that started the
sweep reads. So all of it works alike whichever launcher runs the jobs, and wherever. A sweep has
succeeded when each of its runs has left word that it finished: one that leaves none has failed.
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
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from experiments.configuration import SettingError
from experiments.runs.records import write_json
from experiments.runs.tracking import check_tracking, log_sweep
from experiments.runs.units import FAILED, FINISHED, read_record

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

    Exits with 1 if a run of it failed or did not come to its end. Ctrl-C and a launcher's own
    errors pass through after the report.
    """
    check_launcher(sys.argv[1:])
    done = False
    try:
        main()
    except SystemExit as ended:
        if ended.code:  # else by a run that ended its process: the report tells
            raise
    finally:
        done = _watched.pop().end() if _watched else True
    if not done:
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


def expand(overrides: list[str], hydra_config: DictConfig) -> list[list[str]]:
    """The runs of a sweep, each as its overrides, in the order in which Hydra numbers them.

    As by Hydra's basic sweeper, in a process in which Hydra is set up: what a ``glob()`` stands for
    is read off its configs.

    Raises
    ------
    ValueError
        If there are none, or another sweeper is to make them.
    """
    if not hydra_config.sweeper._target_.endswith(f".{BasicSweeper.__name__}"):
        raise ValueError(
            f"hydra/sweeper is {hydra_config.sweeper._target_}; whether all runs of a sweep have "
            "finished is known for that of Hydra itself only, hydra/sweeper=basic"
        )
    params = hydra_config.sweeper.get("params") or {}
    texts = [*(f"{key}={value}" for key, value in params.items()), *overrides]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    runs = BasicSweeper.split_arguments(parser.parse_overrides(texts), max_batch_size=None)[0]
    if not runs:
        raise ValueError(
            f"the sweep has no runs, since a glob() matches nothing: {' '.join(texts)}"
        )
    return runs


def group_of(experiment_name: str, hydra_config: DictConfig) -> str:
    """One group a sweep; a single run is a group of its own."""
    multirun = hydra_config.mode == RunMode.MULTIRUN
    folder = Path(hydra_config.sweep.dir if multirun else hydra_config.run.dir)
    return f"{experiment_name}-{folder.name}"


def check_watched(hydra_config: DictConfig) -> None:
    """Raise a ValueError for a run of a sweep that nobody would miss if it failed."""
    if hydra_config.mode != RunMode.MULTIRUN:
        return
    callback = (hydra_config.callbacks or {}).get("sweep") or {}
    if callback.get("_target_") != f"{__name__}.{SweepCallback.__name__}":
        raise ValueError(
            "hydra.callbacks.sweep is not that of conf/compress.yaml, without which a sweep would "
            "hide what fails; leave it as it is"
        )


def note_outcome(hydra_config: DictConfig, name: str, state: str, **about) -> None:
    """Leave word of how a job ended, for the process that started the sweep."""
    if hydra_config.mode == RunMode.MULTIRUN:
        path = Path(hydra_config.callbacks.sweep.outcomes) / f"{hydra_config.job.num}.json"
        overrides = list(hydra_config.overrides.task)
        write_json(path, {"name": name, "state": state, "overrides": overrides, **about})


def set_verbosity(verbosity: str) -> None:
    """How much the console says; the log files keep everything."""
    if verbosity not in VERBOSITIES:
        raise SettingError(f"verbosity is {verbosity!r}; choose one of {', '.join(VERBOSITIES)}")
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


class SweepCallback(Callback):
    """Begins the watch over a sweep. Launchers pickle it, so it holds no more than a path.

    Parameters
    ----------
    outcomes : str
        The folder in which the jobs of this sweep, and of no other, note how they ended.
    """

    def __init__(self, outcomes: str):
        self.outcomes = Path(outcomes)

    def on_run_start(self, config: DictConfig, **kwargs) -> None:
        with _ending_the_command():
            check_tracking(config.tracking)

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        with _ending_the_command():
            check_tracking(config.tracking)
            if config.verbosity == "quiet":
                for name in ("hydra", "hydra_plugins"):
                    logging.getLogger(name).setLevel(logging.WARNING)
            _watched.append(Watch(config, self.outcomes))


@contextmanager
def _ending_the_command() -> Iterator[None]:
    """End the process for what a callback raises: Hydra would warn and go on."""
    try:
        yield
    except Exception as error:
        sys.exit(f"Error: {error}")


class Watch:
    """A sweep, seen from the process that started it."""

    def __init__(self, config: DictConfig, outcomes: Path):
        self.config = config
        self.folder = outcomes
        self.total = len(expand(list(config.hydra.overrides.task), config.hydra))
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
        """What the jobs have noted; an outcome that cannot be read is none."""
        outcomes = [_outcome(path) for path in self.folder.glob("*.json")]
        return sorted(filter(None, outcomes), key=lambda outcome: outcome["name"])

    def end(self) -> bool:
        """Report on the sweep; whether all its runs finished."""
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
        return not failed and not missing

    def _log(self, outcomes: list[dict]) -> None:
        folder = Path(self.config.record_dir)
        overrides = list(self.config.hydra.overrides.task)
        try:
            keys = {outcome["key"] for outcome in outcomes if outcome["state"] == FINISHED}
            records = (read_record(folder / f"{key}.json") for key in sorted(keys))
            rows = [record["row"] for record in records if record and record["state"] == FINISHED]
            group = group_of(self.config.experiment_name, self.config.hydra)
            log_sweep(self.config.tracking, group=group, config={"sweep": overrides}, rows=rows)
        except Exception as error:  # it mirrors what is on disk
            log.warning("the sweep was not logged: %s", error)


def _outcome(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


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
