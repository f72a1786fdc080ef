"""Settings of a run that are of the wrong kind, found before anything is loaded or computed.

`SETTINGS` lists what each key of `conf/compress.yaml` and of `conf/method/` can be. What a method
cannot do with a value of the right kind is for the method to say.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddlr.constraints import CONSTRAINTS
from ddlr.method import ORDERS, REFITS
from experiments.configuration import SettingError, given_goals
from experiments.data import TRAINING_SAMPLES, training_samples
from experiments.methods.balf import ALLOCATIONS
from experiments.runs.tracking import MODES, NAMES
from experiments.runs.units import goal_of
from nettrim.smallest import MEASURES


@dataclass(frozen=True)
class Kind:
    """What a setting can be: in words, after "it must be", and as a test of a value."""

    words: str
    allows: Callable[[object], bool]

    def or_null(self) -> "Kind":
        return Kind(f"{self.words}, or null", lambda value: value is None or self.allows(value))


def whole(least: int, example: int) -> Kind:
    """A whole number. 1.5 is none, nor is 1e3, which YAML reads as a fraction, nor true."""
    return Kind(
        f"a whole number from {least} upwards, as {example}",
        lambda value: _is_number(value, int) and value >= least,
    )


def number(low: float, example: float, *, high: float = math.inf, open_below=False) -> Kind:
    """A finite number; `open_below` leaves out `low` itself."""
    bounds = f"above {low:g}" if open_below else f"from {low:g} upwards"
    if high < math.inf:
        bounds = f"between {low:g} and {high:g}"
    return Kind(
        f"a number {bounds}, as {example:g}",
        lambda value: (
            _is_number(value, int | float)
            and math.isfinite(value)
            and low <= value <= high
            and not (open_below and value == low)
        ),
    )


def one_of(*choices: str) -> Kind:
    return Kind(f"one of {', '.join(choices)}", lambda value: value in choices)


def several(kind: Kind) -> Kind:
    """A list of values of one kind, at least one."""
    return Kind(
        f"a list, each of it {kind.words}",
        lambda values: (
            isinstance(values, ListConfig)
            and len(values) > 0
            and all(kind.allows(value) for value in values)
        ),
    )


def _is_number(value, types) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _is_device(value) -> bool:
    try:
        return isinstance(value, str) and (value == "auto" or bool(torch.device(value).type))
    except RuntimeError:
        return False


YES_OR_NO = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a name", lambda value: isinstance(value, str) and value != "")
SHARE = number(0, 0.1, high=1)
# Of weights, that networks are made for.
FROM_SHARE_TO_SHARE = Kind(
    "the smallest and the largest share of weights, as [0.01,0.1]",
    lambda sizes: several(SHARE).allows(sizes) and len(sizes) == 2 and sizes[0] < sizes[1],
)

# In the order in which they are looked at; others may hang on the data set.
SETTINGS = {
    "dataset.name": one_of(*TRAINING_SAMPLES),
    "dataset.held_out": whole(1, 5000),
    "seed": whole(0, 0),
    "calibration_samples": whole(1, 5000),
    "device": Kind("auto or a device of torch, as cpu or cuda:1", _is_device),
    "workers": whole(1, 2),
    "threads": whole(1, 2).or_null(),
    "goal.max_parameters": whole(0, 20000).or_null(),
    "goal.kept_fraction": SHARE.or_null(),
    "goal.max_output_error": number(0, 0.1).or_null(),
    "goal.max_accuracy_drop": number(0, 0.5).or_null(),
    "goal.min_agreement": number(0, 0.99, high=1).or_null(),
    "goal.tolerances": several(number(0, 0.1)).or_null(),
    "goal.largest_layer": SHARE.or_null(),
    "goal.trials": whole(0, 40),
    "goal.trial_sizes": FROM_SHARE_TO_SHARE,
    "goal.allocation": one_of(*ALLOCATIONS),
    "network_refit.samples": whole(1, 20000).or_null(),
    "network_refit.epochs": whole(1, 20),
    "network_refit.learning_rate": number(0, 1e-3, open_below=True),
    "network_refit.temperature": number(0, 2.0, open_below=True),
    "experiment_name": TEXT,
    "rerun": YES_OR_NO,
    "cache.enabled": YES_OR_NO,
    "cache.limit_gib": number(0, 5),
    "tracking.name": one_of(*NAMES),
    "tracking.mode": one_of(*MODES),
    "model.dropout": SHARE,
    "method.relative_tolerance": number(0, 0.1),
    "method.constraint": one_of(*CONSTRAINTS),
    "method.refit": one_of(*REFITS),
    "method.order": one_of(*ORDERS),
    "method.ridge": number(0, 0.01, open_below=True),
    "method.selection": number(0, 0.5, high=0.99),
    "method.minimise": one_of(*MEASURES),
    "method.sparsity_weight": number(0, 0.05, open_below=True).or_null(),
    "method.block_size": whole(1, 128),
    "method.penalise_bias": YES_OR_NO,
    "method.tolerance": number(0, 0.01, open_below=True),
    "method.accuracy": number(0, 1e-6, open_below=True),
    "method.max_iterations": whole(1, 5000),
    "method.raise_on_failure": YES_OR_NO,
}
# Of groups of which some choices have a key and others do not.
_MAY_LACK = ("model.", "method.", "tracking.")


def check_settings(cfg: DictConfig) -> None:
    """Refuse a run of `experiments.compress` whose settings cannot be meant.

    Raises
    ------
    SettingError
        In one line that names the key.
    """
    _check_goals(cfg)
    for key, kind in SETTINGS.items():
        if key == "method.relative_tolerance":
            if given_goals(cfg.goal):
                continue  # it has none then
        elif key.startswith(_MAY_LACK) and not _has(cfg, key):
            continue
        _check(cfg, key, kind)
    _check_samples(cfg)


def _check(cfg: DictConfig, key: str, kind: Kind) -> None:
    if not _has(cfg, key):
        raise SettingError(f"{key} is missing; it must be {kind.words}")
    value = _value(cfg, key)
    if not kind.allows(value):
        raise SettingError(f"{key} is {_shown(value)}; it must be {kind.words}")


def _check_goals(cfg: DictConfig) -> None:
    if not isinstance(OmegaConf.select(cfg, "goal"), DictConfig):
        raise SettingError("goal must have entries, as goal.kept_fraction=0.1")
    unknown = [name for name in cfg.goal if f"goal.{name}" not in SETTINGS]
    if unknown:
        known = [key for key in SETTINGS if key.startswith("goal.")]
        raise SettingError(f"goal.{unknown[0]} is unknown; choose one of {', '.join(known)}")
    goals = given_goals(cfg.goal)
    for key in _of_measured_allocation(cfg):
        if not goals:
            raise SettingError(
                f"{key} is given without a goal; set one, as goal.kept_fraction=0.1, or give "
                "method.relative_tolerance alone"
            )
    _check_allocation(cfg, goals)
    if not goals:
        return
    name, wanted = goal_of(cfg)  # raises where there are several
    key = "method.relative_tolerance"
    tolerance = _value(cfg, key) if _has(cfg, key) else None
    if tolerance is not None:
        raise SettingError(
            f"{key} is {_shown(tolerance)} and goal.{name} is {_shown(wanted)}; give one of them, "
            "not both"
        )


def _check_allocation(cfg: DictConfig, goals: dict) -> None:
    if cfg.goal.get("allocation") != "energy":
        return
    if not goals:
        raise SettingError(
            "goal.allocation is 'energy' without a goal; set one, as goal.kept_fraction=0.1"
        )
    for key in _of_measured_allocation(cfg):
        raise SettingError(
            f"{key} is given, but goal.allocation is 'energy', which has its own; leave one of "
            "them out"
        )


def _of_measured_allocation(cfg: DictConfig) -> list[str]:
    """What is given of the settings that decide at which tolerances layers are tried."""
    names = ("tolerances", "largest_layer", "trials")
    return [f"goal.{name}" for name in names if cfg.goal.get(name)]


def _check_samples(cfg: DictConfig) -> None:
    """That the data set has the samples; the number of those left hangs on those held out."""
    name, held_out = cfg.dataset.name, cfg.dataset.held_out
    try:
        most = training_samples(name, held_out)
    except ValueError as error:
        raise SettingError(f"dataset.{error}") from error
    for key in ("calibration_samples", "network_refit.samples"):
        samples = OmegaConf.select(cfg, key)
        if samples is not None and samples > most:
            raise SettingError(
                f"{key} is {samples}; {name} has {most} training samples to draw from, so it must "
                "be between 1 and that"
            )


def _has(cfg: DictConfig, key: str) -> bool:
    *groups, name = key.split(".")
    for group in groups:
        cfg = cfg.get(group)
        if not isinstance(cfg, DictConfig):
            return False
    return name in cfg.keys()


def _value(cfg: DictConfig, key: str):
    try:
        return OmegaConf.select(cfg, key, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise SettingError(f"{key} cannot be read: {str(error).splitlines()[0]}") from error


def _shown(value) -> str:
    """A value as one would write it in a config."""
    return {None: "null", True: "true", False: "false"}[value] if _is_word(value) else repr(value)


def _is_word(value) -> bool:
    return value is None or isinstance(value, bool)
