"""The programs in CVXPY: solver choice, certificates of their answers, and the methods."""

import logging

import mosek
import pytest
import torch
from torch import nn

import ddlr
from ddlr import ConvergenceError, SolverStatus, solve_low_rank
from experiments.methods import cone_solvers
from experiments.methods.cone_solvers import (
    L1_BY_CONE,
    NUCLEAR_BY_CONE,
    choose_solver,
    solve_reference,
)
from made_up import made_up_layer
from nettrim import solve_sparse

OURS = {"nuclear": solve_low_rank, "l1": solve_sparse}


class _Licence:
    """An environment of MOSEK that has, or has not, a licence."""

    def __init__(self, found: bool):
        self.found = found

    def __call__(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_arguments):
        return False

    def checkoutlicense(self, _feature):
        if not self.found:
            raise mosek.Error(mosek.rescode.err_missing_license_file, "file not found")


def test_mosek_is_chosen_where_it_is_licensed(monkeypatch):
    monkeypatch.setattr(mosek, "Env", _Licence(found=True))
    assert choose_solver("auto") == choose_solver("MOSEK") == "MOSEK"


def test_mosek_without_a_licence_is_skipped_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr(mosek, "Env", _Licence(found=False))
    with caplog.at_level(logging.INFO, logger=cone_solvers.__name__):
        assert choose_solver("auto") == "SCS"
    assert [record.message for record in caplog.records] == [
        "MOSEK has no licence (err_missing_license_file); SCS is used instead"
    ]
    with pytest.raises(ValueError, match=r"no licence .*choose SCS or CLARABEL"):
        choose_solver("MOSEK")


def test_unknown_solvers_are_refused():
    assert choose_solver("CLARABEL") == "CLARABEL"
    with pytest.raises(ValueError, match="solver is 'GUROBI'; choose one of"):
        choose_solver("GUROBI")


@pytest.mark.parametrize("solver", ["SCS", "CLARABEL"])
@pytest.mark.parametrize("norm", OURS)
@pytest.mark.parametrize("constraint", ["nettrim", "hinge"])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_a_cone_solvers_dual_certifies_its_answer(solver, norm, constraint, activation):
    inputs, targets = made_up_layer(25, 6, 5, activation=activation, seed=4)
    radius = 0.2 * targets.norm().item()
    options = {"activation": activation, "constraint": constraint}
    result = solve_reference(
        inputs, targets, radius, norm=norm, solver=solver, tolerance=1e-5, **options
    )
    assert result.status is SolverStatus.CONVERGED
    assert abs(result.relative_gap) <= 1e-5
    ours = OURS[norm](inputs, targets, radius, tolerance=1e-6, max_iterations=50_000, **options)
    assert result.lower_bound <= ours.objective * (1 + 1e-6)


def test_a_coarse_answer_is_an_error_that_carries_the_result():
    inputs, targets = made_up_layer(25, 6, 5, seed=4)
    with pytest.raises(ConvergenceError, match="SCS answered optimal, but") as caught:
        solve_reference(
            inputs,
            targets,
            0.2 * targets.norm().item(),
            norm="nuclear",
            accuracy=1e-1,
            tolerance=1e-6,
        )
    assert caught.value.result.status is SolverStatus.ITERATION_LIMIT


@pytest.mark.parametrize("norm", OURS)
def test_a_network_is_compressed_by_a_cone_solver(norm):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    method = {"nuclear": NUCLEAR_BY_CONE, "l1": L1_BY_CONE}[norm]
    method = method.with_options(solver="CLARABEL", accuracy=1e-7, tolerance=1e-3)
    result = ddlr.compress_network(network, torch.randn(40, 6), method, relative_tolerance=0.3)
    assert [layer.status for layer in result.layers] == [SolverStatus.CONVERGED] * 2
    assert all(layer.violation <= 1e-3 for layer in result.layers)
    if norm == "l1":
        assert sum(layer.nonzeros for layer in result.layers) < 45
