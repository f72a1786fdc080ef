"""Options of layers that are kept: computed once, and anew where an entry has another form."""

import logging

import pytest
import torch
from omegaconf import OmegaConf

from ddlr.goals import Allocation, Option
from experiments.runs import layer_options
from experiments.runs.layer_options import remembered_allocations, remembered_options

CPU = torch.device("cpu")
OPTIONS = {"fc": [Option(tolerance=0.1, parameters=5, divergence=0.2)]}


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.setattr(layer_options, "content_key", lambda cfg, device: "key")
    return OmegaConf.create(
        {
            "cache": {"enabled": True, "limit_gib": 1},
            "cache_dir": str(tmp_path),
            "method": {
                "_target_": "ddlr.compress",
                "name": "ddlr",
                "relative_tolerance": 0.1,
                "refit": "none",
            },
            "goal": {
                "tolerances": [0.1],
                "trials": 5,
                "trial_sizes": [0.1, 0.5],
                "allocation": "roots",
            },
        }
    )


def test_options_are_computed_once(cfg):
    assert remembered_options(cfg, CPU, lambda: OPTIONS) == OPTIONS
    assert remembered_options(cfg, CPU, lambda: pytest.fail("computed again")) == OPTIONS


@pytest.mark.parametrize(
    "text", ['{"fc": [{"tolerance": 0.1, "effect": 0.2}]}', '{"fc": 3}', "[1]", '{"fc"']
)
def test_an_entry_of_another_form_is_computed_anew_with_a_warning(cfg, tmp_path, caplog, text):
    remembered_options(cfg, CPU, lambda: OPTIONS)
    (path,) = tmp_path.glob("*.json")
    path.write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert remembered_options(cfg, CPU, lambda: OPTIONS) == OPTIONS
    assert "cannot be read and is computed anew" in caplog.text
    assert remembered_options(cfg, CPU, lambda: pytest.fail("not replaced")) == OPTIONS


def test_allocations_are_computed_once_for_each_number_of_trials_and_each_order(cfg):
    found = [Allocation(5, 0.2, {"fc": 0.1}, measured=True)]
    assert remembered_allocations(cfg, CPU, lambda: found) == found
    assert remembered_allocations(cfg, CPU, lambda: pytest.fail("computed again")) == found
    others = []
    for key, value in {
        "goal.trials": 6,
        "method.order": "cascade",
        "goal.trial_sizes": [0, 1],
    }.items():
        OmegaConf.update(cfg, key, value, force_add=True)
        assert remembered_allocations(cfg, CPU, lambda: others) == others, key
