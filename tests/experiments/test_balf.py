"""BALF's allocation: the knapsack against brute force, budgets, and runs that ask for it."""

import itertools
from pathlib import Path

import pytest
import torch
from hydra import compose as compose_config
from hydra import initialize_config_dir
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn

import ddlr
from ddlr import CapturedLayers, Goal, capture_layers
from ddlr.allocate import frontier
from ddlr.captured import CapturedLayer
from ddlr.sizes import fewest_stored
from experiments import compress
from experiments.configuration import CONFIG_PATH, REPOSITORY, SettingError
from experiments.methods.balf import energy_options
from experiments.methods.closed_forms import ACTIVATION_SVD
from experiments.methods.osscar import OSSCAR
from experiments.networks import mlp_digits
from experiments.runs import preparation
from experiments.runs.checkpoints import checkpoint_path, load_checkpoint
from experiments.runs.checks import check_settings
from experiments.runs.units import describe, run_key, settings

CHECKPOINTS = REPOSITORY / "results/checkpoints"
# Singular values of two layers of known energies, and their shapes (out_features, in_features).
SPECTRA = {"one": (9.0, 4.0, 2.0, 1.0, 0.5), "two": (3.0, 2.5, 2.0, 1.5)}
SHAPES = {"one": (5, 8), "two": (6, 4)}


def orthogonal(rows: int, columns: int, seed: int) -> Tensor:
    """Orthonormal columns, each of mean zero."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn - drawn.mean(dim=0)).Q


def layer_of_spectrum(name: str) -> CapturedLayer:
    """A layer without an activation, whose inputs have the identity for their Gram matrix."""
    values = torch.tensor(SPECTRA[name], dtype=torch.float64)
    out_features, in_features = SHAPES[name]
    inputs, rank = orthogonal(40, in_features, seed=1), len(values)
    left = torch.linalg.qr(orthogonal(20, out_features, seed=2)[:out_features]).Q[:, :rank]
    right = torch.linalg.qr(orthogonal(20, in_features, seed=3)[:in_features]).Q[:, :rank]
    weight = (left * values) @ right.T
    bias = torch.zeros(out_features, dtype=torch.float64)
    return CapturedLayer(name, inputs, inputs @ weight.T, "none", weight, bias)


@pytest.fixture
def known() -> CapturedLayers:
    layers = tuple(layer_of_spectrum(name) for name in SPECTRA)
    return CapturedLayers(layers, layers[0].inputs)


def lost_share(values: tuple[float, ...], rank: int) -> float:
    energies = [value**2 for value in values]
    return sum(energies[rank:]) / sum(energies)


def test_an_option_is_a_rank_with_its_size_and_the_share_of_energy_that_it_loses(known):
    for name, options in energy_options(known).items():
        out_features, in_features = SHAPES[name]
        dense, *ranks = options
        assert (dense.tolerance, dense.divergence) == (0, 0)
        assert dense.parameters == out_features * in_features
        assert len(ranks) == min(SHAPES[name]) - 1
        for rank, option in enumerate(reversed(ranks), start=1):
            assert option.parameters == fewest_stored(rank, in_features, out_features)
            share = lost_share(SPECTRA[name], rank)
            assert option.divergence == pytest.approx(share, rel=1e-9)
            # Without an activation the error is what the energy says.
            before = lost_share(SPECTRA[name], rank - 1)
            assert share**0.5 < option.tolerance < before**0.5


def test_the_knapsack_is_that_of_brute_force_at_every_budget(known):
    choices = []
    for name, values in SPECTRA.items():
        out_features, in_features = SHAPES[name]
        ranks = range(1, min(SHAPES[name]))
        choices.append([(out_features * in_features, 0.0)])
        choices[-1] += [
            (fewest_stored(rank, in_features, out_features), lost_share(values, rank))
            for rank in ranks
        ]
    every = [
        (sum(size for size, _ in pair), sum(lost for _, lost in pair))
        for pair in itertools.product(*choices)
    ]
    allocations = frontier(energy_options(known))
    smallest = min(size for size, _ in every)
    for budget in range(smallest, max(size for size, _ in every) + 1):
        best = min(lost for size, lost in every if size <= budget)
        found = [each for each in allocations if each.parameters <= budget][-1]
        assert found.divergence == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    model = mlp_digits()
    load_checkpoint(checkpoint_path(CHECKPOINTS, "mlp_digits", "digits", 0), model, "")
    return model


@pytest.fixture(scope="module")
def captured(network, digits) -> CapturedLayers:
    return capture_layers(network, digits.calibration(300, seed=0))


def test_the_network_is_never_run(network, captured, monkeypatch):
    calls, forward = [], type(network).forward
    monkeypatch.setattr(
        type(network), "forward", lambda *given: (calls.append(1), forward(*given))[1]
    )
    monkeypatch.setattr(
        nn.Linear, "forward", lambda *_: pytest.fail("a layer was run for the options")
    )
    options = energy_options(captured)
    assert not calls and set(options) == {layer.name for layer in captured.layers}


def test_each_option_s_tolerance_gives_its_rank(network, captured):
    options = energy_options(captured)
    for layer in captured.layers:
        alone = captured.only([layer.name])
        for option in options[layer.name][1:]:
            result = ddlr.compress_network(
                network, alone, ACTIVATION_SVD, relative_tolerance=option.tolerance
            )
            [report] = result.layers
            assert report.parameters_kept == option.parameters


@pytest.mark.parametrize("order", ["parallel", "cascade"])
@pytest.mark.parametrize("fraction", [0.15, 0.3, 0.6])
def test_budgets_are_kept(order, fraction, network, captured):
    options = energy_options(captured)
    method = ACTIVATION_SVD if order == "parallel" else OSSCAR
    goal = Goal(kept_fraction=fraction, options=options)
    result = ddlr.compress_network(network, captured, method, goal=goal, order=order)
    kept = sum(report.parameters_kept for report in result.layers)
    assert result.goal.met and kept <= fraction * captured.weights
    if order == "parallel":
        budget = int(fraction * captured.weights)
        allocations = frontier(options)
        tolerances = {report.name: report.relative_tolerance for report in result.layers}
        [made] = [each for each in allocations if each.tolerances == pytest.approx(tolerances)]
        # That of the knapsack, or one that fits since a layer left as it is has dead weights.
        best = [each for each in allocations if each.parameters <= budget][-1]
        assert made.divergence <= best.divergence
        assert made == best or (0.0 in tolerances.values() and kept < made.parameters)


# --- runs ------------------------------------------------------------------------------------


def configured(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return compose_config(
            "compress",
            overrides=[
                *("dataset=digits", "model=mlp_digits", "calibration_samples=200"),
                *("tracking=none", "device=cpu", "cache.enabled=false"),
                *(f"results_dir={folder}/results", f"output_dir={folder}/outputs"),
                *(f"checkpoint_dir={CHECKPOINTS}", *overrides),
            ],
        )


def test_a_run_with_the_usual_allocation_is_known_as_before(tmp_path):
    for goal in ("goal.kept_fraction=0.3", "goal.kept_fraction=null"):
        cfg = configured(tmp_path, "method=activation_svd", goal)
        before = cfg.copy()
        with open_dict(before):
            del before.goal.allocation
        assert settings(cfg) == settings(before) and run_key(cfg) == run_key(before)
        assert describe(cfg) == describe(before)
        assert "allocation" not in str(settings(cfg))
    energy = configured(tmp_path, "method=svd", "goal.kept_fraction=0.3", "goal.allocation=energy")
    usual = configured(tmp_path, "method=svd", "goal.kept_fraction=0.3")
    assert run_key(energy) != run_key(usual)
    assert "kept_fraction_by_energy 0.3" in describe(energy)


def test_a_run_by_energies_measures_no_layer_alone_and_says_how_it_was_allocated(
    tmp_path, monkeypatch
):
    preparation.forget()
    monkeypatch.setattr(compress, "layer_options", lambda *_, **__: pytest.fail("measured"))
    cfg = configured(
        tmp_path, "method=activation_svd", "goal.kept_fraction=0.3", "goal.allocation=energy"
    )
    row = compress.run(cfg, group="g")[0]["row"]
    assert (row["goal"], row["wanted"]) == ("kept_fraction_by_energy", 0.3)
    assert row["goal_met"] and row["kept_fraction"] <= 0.3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["goal.allocation=energy"], "goal.allocation is 'energy' without a goal"),
        (
            ["goal.allocation=energy", "goal.kept_fraction=0.3", "goal.tolerances=[0.1]"],
            "goal.tolerances is given, but goal.allocation is 'energy'",
        ),
        (
            ["goal.allocation=enrgy", "goal.kept_fraction=0.3"],
            "it must be one of measured, roots, energy",
        ),
    ],
)
def test_an_allocation_that_cannot_be_meant_is_refused(overrides, words, tmp_path):
    with pytest.raises(SettingError, match=words):
        check_settings(configured(tmp_path, "method=svd", *overrides))
