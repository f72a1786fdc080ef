"""Where a sweep stands: ``python -m experiments.status`` with the arguments of the sweep.

python -m experiments.status networks=lenets suite=convex
python -m experiments.status model=lenet5 method=ddlr,nettrim method.relative_tolerance=0.1,0.2
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from statistics import mean

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from experiments.configuration import CONFIG_PATH, SettingError
from experiments.runs.checks import check_settings
from experiments.runs.sweeping import check_launcher, duration, expand
from experiments.runs.units import FAILED, FINISHED, MISSING, RUNNING, describe_any, run_key, state


def main() -> None:
    check_launcher(sys.argv[1:])
    overrides = [each for each in sys.argv[1:] if each not in ("-m", "--multirun")]
    try:
        configs = planned(overrides)
    except ValueError as error:
        sys.exit(f"Error: {error}")
    print(status(configs))


def planned(overrides: list[str]) -> list[DictConfig]:
    """The configs of a sweep's runs, composed as Hydra composes them."""
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        _, runs = expanded(overrides)
        return [compose("compress", overrides=run) for run in runs]


def expanded(overrides: list[str]) -> tuple[DictConfig, list[list[str]]]:
    """The config of a sweep as a whole, and its runs as their overrides; none is composed."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    single = [each.input_line for each in parsed if not each.is_sweep_override()]
    whole = compose("compress", overrides=single, return_hydra_config=True)
    return whole, expand(overrides, whole.hydra)


def status(configs: list[DictConfig]) -> str:
    """A table for people: counts, the time left, and each run that is not finished."""
    runs, found = {}, {}
    for cfg in configs:
        try:
            check_settings(cfg)
        except SettingError as error:
            key, now = str(error), (FAILED, {"error": f"{type(error).__name__}: {error}"})
        else:
            # The same run may stand in a sweep twice; it is done once.
            key = run_key(cfg)
            now = state(cfg, key)
        runs[key], found[key] = cfg, now
    counts = Counter(how for how, _ in found.values())
    lines = [
        f"{len(runs)} runs: "
        + ", ".join(f"{counts[how]} {how}" for how in (FINISHED, RUNNING, FAILED, MISSING))
    ]
    left = len(runs) - counts[FINISHED]
    seconds = seconds_left(runs, found)
    if left and seconds is not None:
        at_once = max(1, counts[RUNNING])
        lines.append(
            f"about {duration(seconds / at_once)} left, at {at_once} at once and "
            f"{duration(seconds / left)} a run"
        )
    for how in (RUNNING, FAILED, MISSING):
        for key, (now, about) in found.items():
            if now == how:
                lines.append(f"  {how:8} {describe_any(runs[key], 'a run')}{_note(how, about)}")
    return "\n".join(lines)


def seconds_left(
    runs: Mapping[str, DictConfig], found: Mapping[str, tuple[str, dict | None]]
) -> float | None:
    """Computing time of the runs that are not finished, one after the other.

    A run is taken to last as long as those of the same network and method did on average, else as
    those of the same network, else as all. None where no run is finished.
    """
    kinds = {key: (cfg.model.name, cfg.method.name) for key, cfg in runs.items()}
    took = defaultdict(list)
    for key, (how, about) in found.items():
        if how == FINISHED and "seconds" in about:
            for kind in _from_close_to_far(*kinds[key]):
                took[kind].append(about["seconds"])
    if not took:
        return None
    means = {kind: mean(seconds) for kind, seconds in took.items()}
    return sum(
        next(means[kind] for kind in _from_close_to_far(*kinds[key]) if kind in means)
        for key, (how, _) in found.items()
        if how != FINISHED
    )


def _from_close_to_far(model: str, method: str) -> tuple[tuple[str, ...], ...]:
    return (model, method), (model,), ()


def _note(how: str, about: dict | None) -> str:
    if how == RUNNING and about:
        return f"  process {about['process']} on {about['host']}"
    return f"  {about['error'].splitlines()[0]}" if how == FAILED else ""


if __name__ == "__main__":
    main()
