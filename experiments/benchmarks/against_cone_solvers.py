"""Our solver and general cone solvers, each to the same certified gap."""

import logging

import torch
from omegaconf import DictConfig

from ddlr import ConvergenceError
from experiments.benchmarks.layers import Layer, made_up_layer
from experiments.benchmarks.timing import result_columns, timed_solve
from experiments.methods.cone_solvers import choose_solver, solve_reference

log = logging.getLogger(__name__)


def against_cone_solvers(cfg: DictConfig, device: torch.device) -> list[dict]:
    """Our solver and SCS, Clarabel and MOSEK, each to the same certified gap."""
    rows = []
    settings = cfg.reference
    for solver in ("SCS", "CLARABEL", "MOSEK"):
        try:
            choose_solver(solver)
        except ValueError as error:
            log.info("%s", error)
            continue
        choice = settings[solver]
        for shape in choice.layers:
            layer = made_up_layer(*shape, device=device, dtype=getattr(torch, choice.dtype))
            ours = timed_solve(layer, "nuclear", settings.relative_tolerance, choice.gap)
            theirs = cone_solve(layer, solver, choice.gap, settings)
            rows += [{**ours, "case": solver}, {**theirs, "case": solver}]
            log.info(
                "%s: %.2f s, ours %.4f s (%.0f times as fast), %s",
                solver,
                theirs["seconds"],
                ours["seconds"],
                theirs["seconds"] / ours["seconds"],
                layer.shape,
            )
    alone = settings.ours_alone
    for shape in alone.layers:
        layer = made_up_layer(*shape, device=device, dtype=getattr(torch, alone.dtype))
        ours = timed_solve(layer, "nuclear", settings.relative_tolerance, alone.gap)
        rows.append({**ours, "case": "SCS"})
    return rows


def cone_solve(layer: Layer, solver: str, gap: float, settings: DictConfig) -> dict:
    """The first accuracy at which the certificate agrees; if none does, the last one's numbers."""
    for accuracy in settings.accuracies:
        try:
            result = solve_reference(
                layer.inputs,
                layer.targets,
                layer.radius(settings.relative_tolerance),
                norm="nuclear",
                activation=layer.activation,
                solver=solver,
                accuracy=accuracy * gap,
                tolerance=gap,
            )
        except ConvergenceError as error:
            result = error.result
        if result.status == "converged":
            break
    return {
        "norm": "nuclear",
        "solver": solver,
        **layer.shape,
        "relative_tolerance": settings.relative_tolerance,
        "gap_asked": gap,
        **result_columns(result),
    }
