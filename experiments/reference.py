"""The layer programs written a second time, in CVXPY, for independent solvers to answer.

Only for small layers: the nuclear norm makes a semidefinite program of size in + out features.
"""

import time
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

# CVXPY's own option names for about eight digits.
_ACCURACY = {
    "SCS": {"eps_abs": 1e-8, "eps_rel": 1e-8, "max_iters": 200_000},
    "CLARABEL": {},
    "MOSEK": {},
}
NORMS = {"nuclear": cp.normNuc, "l1": lambda weight: cp.sum(cp.abs(weight))}


@dataclass(frozen=True)
class ReferenceSolution:
    """What an independent solver answered, in the dtype of the inputs."""

    weight: Tensor
    bias: Tensor
    objective: float
    status: str
    seconds: float


def solve_reference(
    inputs: Tensor,
    targets: Tensor,
    radius: float,
    *,
    norm: str,
    activation: str = "relu",
    constraint: str = "net_trim",
    solver: str = "SCS",
) -> ReferenceSolution:
    """Solve the program of `ddlr.solve_low_rank` or `nettrim.solve_sparse` with a cone solver.

    Parameters
    ----------
    inputs, targets, radius, activation, constraint
        As for `ddlr.solve_low_rank`.
    norm : {"nuclear", "l1"}
    solver : {"SCS", "CLARABEL", "MOSEK"}
        Always named: CVXPY's own choice fails where MOSEK is installed without a licence.
    """
    x, y = (np.asarray(tensor.double()) for tensor in (inputs, targets))
    weight, bias = cp.Variable((y.shape[1], x.shape[1])), cp.Variable(y.shape[1])
    outputs = x @ weight.T + np.ones((len(x), 1)) @ cp.reshape(bias, (1, y.shape[1]), order="C")
    active = (y > 0) if activation == "relu" else np.ones_like(y, dtype=bool)
    # The deviation enters through entrywise bounds, which serve both sets alike.
    slack = cp.Variable(y.shape, nonneg=True)
    constraints = [
        cp.multiply(active, outputs - y) <= slack,
        cp.multiply(active, y - outputs) <= slack,
        cp.norm(slack, "fro") <= radius,
    ]
    if not active.all():
        allowed = 0 if constraint == "net_trim" else slack
        constraints.append(cp.multiply(~active, outputs) <= allowed)
    problem = cp.Problem(cp.Minimize(NORMS[norm](weight)), constraints)
    started = time.perf_counter()
    objective = problem.solve(solver=solver, **_ACCURACY[solver])
    seconds = time.perf_counter() - started
    return ReferenceSolution(
        weight=torch.as_tensor(weight.value).to(inputs),
        bias=torch.as_tensor(bias.value).to(inputs),
        objective=float(objective),
        status=problem.status,
        seconds=seconds,
    )
