"""One trained layer: our solves, their path over tolerances, and the plain method beside them."""

import logging
import time

import torch
from omegaconf import DictConfig

from ddlr import CentredInputs
from ddlr.certificate import certify
from ddlr.constraints import OutputSet
from experiments.benchmarks.layers import Layer, trained_layer
from experiments.benchmarks.timing import (
    SOLVERS,
    SUM,
    pair_seconds,
    result_columns,
    solve_layer,
    synchronise,
    timed_solve,
)
from experiments.methods.cone_solvers import NORMS
from experiments.methods.plain_admm import plain_admm

log = logging.getLogger(__name__)

_TRACE_INTERVAL = 10  # iterations between the points of our trace
_CHECK_INTERVAL = 50  # iterations between the certificates of the plain method


def one_layer(cfg: DictConfig, device: torch.device) -> list[dict]:
    """Gap and violation against time on a trained layer, ours and the plain method."""
    settings = cfg.layer
    layer = trained_layer(cfg, device, settings.samples)
    rows = []
    for norm in SOLVERS:
        common = {"norm": norm, **layer.shape, "relative_tolerance": settings.relative_tolerance}
        pair = pair_seconds(layer)
        solved = timed_solve(layer, norm, settings.relative_tolerance, settings.gap)
        rows.append({**solved, "case": "solve"})
        log.info(
            "%s: %d iterations, %.2f s, %.0f pairs, %.2f pairs per iteration",
            norm,
            solved["iterations"],
            solved["seconds"],
            solved["seconds"] / pair,
            solved["seconds"] / pair / solved["iterations"],
        )
        for limit in range(_TRACE_INTERVAL, 10_000, _TRACE_INTERVAL):
            result = solve_layer(layer, norm, settings.relative_tolerance, settings.gap, limit)
            rows.append({**common, "case": "trace", "solver": "ours", **result_columns(result)})
            if result.iterations < limit or result.status == "converged":
                break
        for penalty in settings.penalties:
            trace = plain_trace(layer, norm, settings, penalty)
            rows += [{**common, "case": "trace", **row} for row in trace]
            reached = [row for row in trace if row["status"] == "converged"]
            last = (reached or trace)[-1]
            rows.append({**common, "case": "solve", "pair_seconds": pair, **last})
            log.info(
                "%s, %s: %s in %.1f s, %d iterations, gap %.1e, violation %.1e",
                norm,
                last["solver"],
                last["status"],
                last["seconds"],
                last["iterations"],
                last["relative_gap"],
                last["violation"],
            )
    return rows


def plain_trace(layer: Layer, norm: str, settings: DictConfig, penalty: float) -> list[dict]:
    """The plain method's trace, until its certificate is within the gap or its time is up."""
    radius = layer.radius(settings.relative_tolerance)
    outputs = OutputSet(layer.targets, radius, layer.activation, "nettrim")
    begun = time.perf_counter()
    iterates = plain_admm(
        NORMS[norm], outputs, layer.inputs, layer.start.weight, layer.start.bias, penalty
    )
    rows, seconds = [], 0.0
    for iteration, (weight, bias, dual) in enumerate(iterates, start=1):
        if iteration % _CHECK_INTERVAL:
            continue
        synchronise(layer.inputs.device)
        seconds += time.perf_counter() - begun
        proof = certify(
            weight,
            bias,
            dual,
            layer.inputs,
            layer.targets,
            radius,
            norm=NORMS[norm],
            activation=layer.activation,
        )
        rows.append(
            {
                "solver": f"plain, penalty {penalty}",
                "iterations": iteration,
                "seconds": seconds,
                "relative_gap": proof.relative_gap,
                "violation": proof.violation,
                "status": "converged" if proof.within(settings.gap) else "time_limit",
            }
        )
        if proof.within(settings.gap) or seconds > settings.seconds_limit:
            return rows
        begun = time.perf_counter()
    raise AssertionError("the plain method iterates without end")


def sum_of_structures(cfg: DictConfig, device: torch.device) -> list[dict]:
    """Low rank plus sparse on the same layer, by the convex program for both at once."""
    settings = cfg.layer
    layer = trained_layer(cfg, device, settings.samples)
    solved = timed_solve(layer, SUM, settings.relative_tolerance, settings.gap)
    pairs = solved["seconds"] / solved["pair_seconds"]
    log.info("%s: %d iterations, %.0f pairs", SUM, solved["iterations"], pairs)
    return [{**solved, "case": "solve"}]


def tolerance_path(cfg: DictConfig, device: torch.device) -> list[dict]:
    """Eight tolerances of one layer, each started at the one before, against one solve alone."""
    settings = cfg.layer
    layer = trained_layer(cfg, device, settings.samples)
    rows = []
    for norm, solve in SOLVERS.items():
        alone = timed_solve(layer, norm, settings.relative_tolerance, settings.gap)
        rows.append({**alone, "case": "one"})
        started = time.perf_counter()
        geometry, start, iterations = CentredInputs(layer.inputs), layer.start, 0
        for relative_tolerance in cfg.path.relative_tolerances:
            start = solve(
                geometry,
                layer.targets,
                layer.radius(relative_tolerance),
                activation=layer.activation,
                tolerance=settings.gap,
                warm_start=start,
            )
            iterations += start.iterations
        seconds = time.perf_counter() - started
        count = len(cfg.path.relative_tolerances)
        rows.append(
            {"case": f"path of {count}", "norm": norm, "solver": "ours", **layer.shape}
            | {"iterations": iterations, "seconds": seconds}
        )
        log.info("%s: %.2f s, one solve %.2f s", norm, seconds, alone["seconds"])
    return rows
