"""Mirror runs to wandb or to CSV files. The record on disk stays the home of every number.

So nothing that happens here may stop or hold up a sweep: where wandb cannot be reached a run is
logged offline, and an error of wandb is a warning.
"""

import csv
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from omegaconf import DictConfig

from experiments.runs.locking import locked

log = logging.getLogger(__name__)

NAMES = ("wandb", "csv", "none")
MODES = ("offline", "online")
_REACH_SECONDS = 3
_INIT_SECONDS = 15
_FINISH_SECONDS = 30

# Of this process: once wandb could not be reached, later runs do not wait for it again.
_unreachable = False

Log = Callable[[dict, list[dict]], None]


class TrackingError(RuntimeError):
    """Tracking that cannot work as it is configured; says what to do."""


def check_tracking(tracking: DictConfig) -> None:
    """Raise a TrackingError at once where runs could not be logged as asked for."""
    if tracking.name != "wandb":
        return
    if tracking.mode not in MODES:
        raise TrackingError(f"tracking.mode is {tracking.mode!r}; choose one of {MODES}")
    if tracking.mode == "online" and not _logged_in():
        raise TrackingError(
            "tracking.mode=online needs a login: run\n  wandb login\n"
            "or set WANDB_API_KEY; tracking.mode=offline needs none"
        )


def _logged_in() -> bool:
    """Whether there is a key, where wandb looks for one; to try it would take a network."""
    import wandb

    settings = wandb.setup().settings
    if settings.api_key or settings.identity_token_file or os.environ.get("WANDB_API_KEY"):
        return True
    own = os.environ.get("NETRC")
    for path in [Path(own)] if own else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc(path).authenticators(urlsplit(settings.base_url).hostname):
                return True
        except (OSError, NetrcParseError):
            continue
    return False


@contextmanager
def track(
    tracking: DictConfig,
    *,
    name: str,
    group: str,
    job_type: str,
    config: dict,
    tags: Sequence[str] = (),
) -> Iterator[Log]:
    """Open a run, and yield the function that logs its summary row and its rows per layer.

    The run is finished when the context is left, also by an exception. With ``tracking=csv`` the
    rows go to two tables in a folder of the group; with ``tracking=none`` nothing is imported or
    written.
    """
    if tracking.name == "none":
        yield lambda summary, layers: None
    elif tracking.name == "csv":
        folder = Path(tracking.directory) / group
        yield lambda summary, layers: _append(folder, summary, layers)
    else:
        check_tracking(tracking)
        about = {"name": name, "group": group, "job_type": job_type, "tags": list(tags)}
        with _wandb_run(tracking, config=config, **about) as run:

            def log_run(summary: dict, layers: list[dict]) -> None:
                with _as_warning():
                    run.log({"layers": _table(layers)})
                    run.summary.update(summary)
                    run.summary.update(
                        {
                            f"layer/{layer['layer']}/{key}": value
                            for layer in layers
                            for key, value in layer.items()
                            if key not in summary and key != "layer"
                        }
                    )

            yield log_run


def log_sweep(tracking: DictConfig, *, group: str, config: dict, rows: list[dict]) -> None:
    """Log the runs of a sweep as one table and as the frontier, accuracy against weights kept."""
    if tracking.name != "wandb" or not rows:
        return
    import wandb

    about = {"name": f"{group} frontier", "group": group, "job_type": "sweep"}
    with _wandb_run(tracking, config=config, **about) as run, _as_warning():
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            line = "{model} {method} {constraint} refit {refit} {order} seed {seed}".format(**row)
            lines.setdefault(line, []).append((row["kept_fraction"], row["accuracy"]))
        lines = dict(sorted(lines.items()))
        points = [list(zip(*sorted(line), strict=True)) for line in lines.values()]
        chart = wandb.plot.line_series(
            xs=[list(line[0]) for line in points],
            ys=[list(line[1]) for line in points],
            keys=list(lines),
            title="Test accuracy (%) against the fraction of weights kept",
            xname="kept_fraction",
        )
        run.log({"runs": _table(rows), "frontier": chart})


def log_figures(
    tracking: DictConfig, *, group: str, config: dict, figures: dict[str, Path], rows: list[dict]
) -> None:
    """Log figures that are on disk, and the table they were drawn from."""
    if tracking.name != "wandb":
        return
    import wandb

    about = {"name": f"{group} figures", "group": group, "job_type": "plot"}
    with _wandb_run(tracking, config=config, **about) as run, _as_warning():
        images = {name: wandb.Image(str(path)) for name, path in figures.items()}
        run.log({**images, "runs": _table(rows)})


def _table(rows: list[dict]):
    import wandb

    columns = list(rows[0])
    return wandb.Table(columns, [[row.get(key) for key in columns] for row in rows])


class _NoRun:
    """Stands in for a run of wandb that could not be opened."""

    summary: dict

    def __init__(self):
        self.summary = {}

    def log(self, content: dict) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        pass


@contextmanager
def _wandb_run(tracking: DictConfig, **about) -> Iterator:
    run = _open(tracking, **about)
    exit_code = 1
    try:
        yield run
        exit_code = 0
    finally:
        with _as_warning():
            run.finish(exit_code=exit_code)


def _open(tracking: DictConfig, **about):
    global _unreachable
    import wandb

    Path(tracking.directory).mkdir(parents=True, exist_ok=True)
    online = tracking.mode == "online" and not _unreachable and _reachable()
    for mode in ("online", "offline") if online else ("offline",):
        try:
            return wandb.init(
                project=tracking.project,
                mode=mode,
                dir=tracking.directory,
                reinit="finish_previous",
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=_INIT_SECONDS,
                    finish_timeout=_FINISH_SECONDS,
                ),
                **about,
            )
        except (wandb.Error, OSError, TimeoutError) as error:
            log.warning("wandb could not start a run (%s): %s", mode, error)
            _unreachable |= mode == "online"
    return _NoRun()


def _reachable() -> bool:
    """Whether something answers at wandb's address. Waiting for it in earnest takes far longer."""
    global _unreachable
    import wandb

    address = urlsplit(wandb.setup().settings.base_url)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=_REACH_SECONDS).close()
        return True
    except OSError as error:
        _unreachable = True
        log.warning(
            "%s cannot be reached (%s); runs are logged offline, `wandb sync` uploads them later",
            address.hostname,
            error,
        )
        return False


@contextmanager
def _as_warning() -> Iterator[None]:
    """Turn what wandb raises into a warning."""
    try:
        yield
    except Exception as error:
        log.warning("wandb: %s: %s", type(error).__name__, error)


def _append(folder: Path, summary: dict, layers: list[dict]) -> None:
    """Add rows to the two tables of a sweep; its processes take turns."""
    with locked(folder / ".lock"):
        for name, rows in (("runs.csv", [summary]), ("layers.csv", layers)):
            with (folder / name).open("a", newline="", encoding="utf-8") as stream:
                table = csv.DictWriter(stream, fieldnames=list(rows[0]))
                if stream.tell() == 0:
                    table.writeheader()
                table.writerows(rows)
