"""The layer programs written a second time, in CVXPY, for independent solvers to answer.

Only for small layers: the nuclear norm makes a semidefinite program of size in + out features.
"""

import dataclasses
import logging
import time

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from ddlr.certificate import certify
from ddlr.compression import store_low_rank
from ddlr.inputs import CentredInputs
from ddlr.layers import store_linear
from ddlr.method import Method
from ddlr.problem import WarmStart
from ddlr.proximal import L1, NUCLEAR
from ddlr.result import ConvergenceError, SolverResult, SolverStatus

log = logging.getLogger(__name__)

SOLVERS = ("MOSEK", "SCS", "CLARABEL")
NORMS = {"nuclear": NUCLEAR, "l1": L1}
# A cone solver leaves a dust of values where an exact optimum has zeros.
_DUST = 1e-5


def choose_solver(wanted: str = "auto") -> str:
    """The CVXPY solver to name: "auto" is MOSEK where a licence is found, and SCS elsewhere.

    Always named, since CVXPY's own choice fails where MOSEK is installed without a licence.

    Raises
    ------
    ValueError
        If the solver is unknown, or is MOSEK and there is no licence.
    """
    if wanted not in (*SOLVERS, "auto"):
        raise ValueError(f"solver is {wanted!r}; choose one of {('auto', *SOLVERS)}")
    if wanted not in ("auto", "MOSEK"):
        return wanted
    missing = _missing_licence()
    if not missing:
        return "MOSEK"
    if wanted == "MOSEK":
        raise ValueError(f"{missing}; choose SCS or CLARABEL, or solver=auto")
    log.info("%s; SCS is used instead", missing)
    return "SCS"


def _missing_licence() -> str | None:
    """Why MOSEK can't be used, or None if it can."""
    try:
        import mosek
    except ImportError:
        return "MOSEK is not installed"
    try:
        with mosek.Env() as environment:
            environment.checkoutlicense(mosek.feature.pton)
    except mosek.Error as error:
        return f"MOSEK has no licence ({error.errno!r})"
    return None


def solve_reference(
    inputs: Tensor,
    targets: Tensor,
    radius: float,
    *,
    norm: str,
    activation: str = "relu",
    constraint: str = "nettrim",
    solver: str = "SCS",
    accuracy: float = 1e-8,
    tolerance: float = 1e-3,
) -> SolverResult:
    """Solve the program of `ddlr.solve_low_rank` or `nettrim.solve_sparse` with a cone solver.

    The certificate is that of this project, from the weight, bias and dual variable that the cone
    solver found. Singular values (entries for l1) below 1e-5 of the largest are set to 0 first.

    Parameters
    ----------
    inputs, targets, radius, activation, constraint, tolerance
        As for `ddlr.solve_low_rank`.
    norm : {"nuclear", "l1"}
    solver : {"SCS", "CLARABEL", "MOSEK"}
    accuracy : float
        The solver's own stopping tolerance.

    Raises
    ------
    ConvergenceError
        If the certificate is not within `tolerance`; carries the result.
    RuntimeError
        If the solver gave no solution at all.
    """
    x, y = (tensor.double().cpu().numpy() for tensor in (inputs, targets))
    weight, bias = cp.Variable((y.shape[1], x.shape[1])), cp.Variable(y.shape[1])
    outputs = x @ weight.T + np.ones((len(x), 1)) @ cp.reshape(bias, (1, y.shape[1]), order="C")
    active = (y > 0) if activation == "relu" else np.ones_like(y, dtype=bool)
    # The deviation enters through entrywise bounds, which serve both sets alike.
    slack = cp.Variable(y.shape, nonneg=True)
    allowed = slack if constraint == "hinge" else np.zeros_like(y)
    above = cp.multiply(active, outputs - y) <= slack
    below = cp.multiply(active, y - outputs) <= slack
    off = cp.multiply(~active, outputs) <= allowed
    constraints = [above, below, cp.norm(slack, "fro") <= radius]
    if not active.all():
        constraints.append(off)
    objective = cp.normNuc(weight) if norm == "nuclear" else cp.sum(cp.abs(weight))
    problem = cp.Problem(cp.Minimize(objective), constraints)
    started = time.perf_counter()
    problem.solve(solver=solver, **_options(solver, accuracy))
    seconds = time.perf_counter() - started
    if weight.value is None:
        raise RuntimeError(f"{solver} found no solution: {problem.status}")

    dual = np.where(active, below.dual_value - above.dual_value, 0.0)
    if not active.all():
        dual -= np.where(active, 0.0, off.dual_value)
    solution = _without_dust(torch.as_tensor(weight.value), norm).to(inputs)
    shift = torch.as_tensor(bias.value).to(inputs)
    proof = certify(
        solution,
        shift,
        torch.as_tensor(dual).to(inputs),
        inputs,
        targets,
        radius,
        norm=NORMS[norm],
        activation=activation,
        constraint=constraint,
    )
    met = proof.within(tolerance)
    result = SolverResult(
        weight=solution,
        bias=shift,
        status=SolverStatus.CONVERGED if met else SolverStatus.ITERATION_LIMIT,
        iterations=int(problem.solver_stats.num_iters or 0),
        objective=proof.objective,
        lower_bound=proof.lower_bound,
        relative_gap=proof.relative_gap,
        violation=proof.violation,
        dual=proof.dual,
        seconds=seconds,
        shortfall=proof.shortfall,
    )
    if not met:
        raise ConvergenceError(
            f"{solver} answered {problem.status}, but the relative gap is "
            f"{proof.relative_gap:.1e}, the violation {proof.violation:.1e} and the shortfall "
            f"{proof.shortfall:.1e}, for a tolerance of {tolerance:g}; lower accuracy",
            result,
        )
    return result


def solve_layer(
    inputs: CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    warm_start: WarmStart,
    norm: str,
    solver: str,
    **options,
) -> SolverResult:
    """`solve_reference` as a solver of `ddlr.method.Method`; it does not begin anywhere."""
    log.info("%s: %d x %d weights", solver, *warm_start.weight.shape)
    return solve_reference(inputs.inputs, targets, radius, norm=norm, solver=solver, **options)


def _with_named_solver(method: Method, _layers, _tolerances) -> Method:
    solver = choose_solver(method.options["solver"])
    return dataclasses.replace(method, options={**method.options, "solver": solver})


def _options(solver: str, accuracy: float) -> dict:
    """One accuracy in the words of each solver."""
    if solver == "SCS":
        return {"eps_abs": accuracy, "eps_rel": accuracy, "max_iters": 200_000}
    if solver == "CLARABEL":
        return {"tol_gap_abs": accuracy, "tol_gap_rel": accuracy, "tol_feas": accuracy}
    names = ("REL_GAP", "PFEAS", "DFEAS")
    return {"mosek_params": {f"MSK_DPAR_INTPNT_CO_TOL_{name}": accuracy for name in names}}


def _without_dust(weight: Tensor, norm: str) -> Tensor:
    if norm == "l1":
        return weight * (weight.abs() > _DUST * weight.abs().max())
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return (left * (values * (values > _DUST * values.max()))) @ right


# `ddlr.compress` and `nettrim.prune` with a cone solver's solves; solver may be "auto".
_OPTIONS = {"constraint": "nettrim", "solver": "auto", "accuracy": 1e-6, "tolerance": 1e-2}
NUCLEAR_BY_CONE = Method(
    "ddlr_cvxpy",
    solve_layer,
    store_low_rank,
    options={"norm": "nuclear", **_OPTIONS},
    orders=("parallel",),
    prepare=_with_named_solver,
)
L1_BY_CONE = Method(
    "nettrim_cvxpy",
    solve_layer,
    store_linear,
    options={"norm": "l1", **_OPTIONS},
    orders=("parallel",),
    prepare=_with_named_solver,
)
