"""Measure the solvers: ``python -m experiments.benchmark``. Writes `results/benchmark.csv`.

Everything is measured against something in the same run: cone solvers at equal certified accuracy,
the plain alternating direction method, or *pairs*. A pair is the time of the two matrix products
that an iteration cannot avoid, X Wt and Rt X, at the layer's shapes, dtype, device and threads.
"""

import itertools
import logging
import math
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import hydra
import matplotlib
import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddlr import (
    CentredInputs,
    ConvergenceError,
    SolverResult,
    WarmStart,
    capture_layers,
    lowest_rank,
    refit_low_rank,
    solve_low_rank,
)
from ddlr.certificate import certify
from ddlr.constraints import OutputSet
from experiments import plot
from experiments.configuration import CONFIG_PATH
from experiments.methods.cone_solvers import NORMS, choose_solver, solve_reference
from experiments.methods.plain_admm import plain_admm
from experiments.runs.preparation import load_network
from experiments.runs.records import write_whole
from experiments.targets import ONE_RANK, RANK_SEARCH
from experiments.training import choose_device
from nettrim import solve_sparse

log = logging.getLogger(__name__)

SOLVERS = {"nuclear": solve_low_rank, "l1": solve_sparse}
_REPETITIONS = 15
_SETTLED = 1e-4  # the share of an error that a further fit lowers it by
_ITERATIONS_A_TRACE_POINT = 10
_ITERATIONS_A_JUDGEMENT = 50
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Layer:
    """A layer problem to be timed, and the weight to start at."""

    inputs: Tensor
    targets: Tensor
    activation: str
    start: WarmStart | None = None

    def radius(self, relative_tolerance: float) -> float:
        return relative_tolerance * torch.linalg.vector_norm(self.targets).item()

    @property
    def shape(self) -> dict:
        return {
            "in_features": self.inputs.shape[1],
            "out_features": self.targets.shape[1],
            "samples": len(self.inputs),
        }


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="benchmark")
def main(cfg: DictConfig) -> None:
    matplotlib.use("Agg")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    unknown = set(cfg.parts) - set(PARTS)
    if unknown:
        raise ValueError(f"parts has {sorted(unknown)}; choose among {list(PARTS)}")
    device = choose_device(cfg.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    common = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    path = Path(cfg.results_dir) / "benchmark.csv"
    for part in cfg.parts:
        rows = [{"part": part, **row, **common} for row in PARTS[part](cfg, device)]
        _replace_part(path, part, pd.DataFrame(rows))
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path} to read; name parts to measure")
    table = pd.read_csv(path)
    targets = measured_targets(table)
    text = targets.to_string(index=False, max_colwidth=None)
    log.info("%s\n%s", path, text)
    write_whole(
        path.with_name("benchmark_targets.csv"),
        lambda scratch: targets.to_csv(scratch, index=False),
    )
    for name, (part, draw) in FIGURES.items():
        if part in set(table["part"]):
            plot.save(draw(table), path.parent / "figures" / f"{name}.png")


# --- the parts -------------------------------------------------------------------------------


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
            ours = _ours(layer, "nuclear", settings.relative_tolerance, choice.gap)
            theirs = _cone_solver(layer, solver, choice.gap, settings)
            rows += [{**ours, "case": solver}, {**theirs, "case": solver}]
            log.info(
                "%s: %.2f s, ours %.4f s (%.0f times as fast), %s",
                *(solver, theirs["seconds"], ours["seconds"]),
                *(theirs["seconds"] / ours["seconds"], layer.shape),
            )
    alone = settings.ours_alone
    for shape in alone.layers:
        layer = made_up_layer(*shape, device=device, dtype=getattr(torch, alone.dtype))
        ours = _ours(layer, "nuclear", settings.relative_tolerance, alone.gap)
        rows.append({**ours, "case": "SCS"})
    return rows


def one_layer(cfg: DictConfig, device: torch.device) -> list[dict]:
    """Gap and violation against time on a trained layer, ours and the plain method."""
    settings = cfg.layer
    layer = trained_layer(cfg, device, settings.samples)
    rows = []
    for norm in SOLVERS:
        common = {"norm": norm, **layer.shape, "relative_tolerance": settings.relative_tolerance}
        pair = pair_seconds(layer)
        solved = _ours(layer, norm, settings.relative_tolerance, settings.gap)
        rows.append({**solved, "case": "solve"})
        log.info(
            "%s: %d iterations, %.2f s, %.0f pairs, %.2f pairs an iteration",
            *(norm, solved["iterations"], solved["seconds"], solved["seconds"] / pair),
            solved["seconds"] / pair / solved["iterations"],
        )
        for limit in range(_ITERATIONS_A_TRACE_POINT, 10_000, _ITERATIONS_A_TRACE_POINT):
            result = _solve(layer, norm, settings.relative_tolerance, settings.gap, limit)
            rows.append({**common, "case": "trace", "solver": "ours", **_numbers(result)})
            if result.iterations < limit or result.status == "converged":
                break
        for penalty in settings.penalties:
            trace = _plain(layer, norm, settings, penalty)
            rows += [{**common, "case": "trace", **row} for row in trace]
            reached = [row for row in trace if row["status"] == "converged"]
            last = (reached or trace)[-1]
            rows.append({**common, "case": "solve", "pair_seconds": pair, **last})
            log.info(
                "%s, %s: %s in %.1f s, %d iterations, gap %.1e, violation %.1e",
                *(norm, last["solver"], last["status"], last["seconds"], last["iterations"]),
                *(last["relative_gap"], last["violation"]),
            )
    return rows


def tolerance_path(cfg: DictConfig, device: torch.device) -> list[dict]:
    """Eight tolerances of one layer, each started at the one before, against one solve alone."""
    settings = cfg.layer
    layer = trained_layer(cfg, device, settings.samples)
    rows = []
    for norm, solve in SOLVERS.items():
        alone = _ours(layer, norm, settings.relative_tolerance, settings.gap)
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


def rank_search(cfg: DictConfig, device: torch.device) -> list[dict]:
    """The search for a trained layer's lowest rank, and the best weight of one rank.

    What is timed begins with the eigenvectors of the inputs, which all solves of a layer share, and
    includes all else, also the projection of the inputs on them. Whether a lower rank was missed is
    tried from random weights.
    """
    settings = cfg.lowest_rank
    own = cfg.copy()
    own.model, own.layer.position = settings.model, settings.position
    layer = trained_layer(own, device, settings.samples)
    eigen = CentredInputs(layer.inputs).eigen

    def geometry() -> CentredInputs:
        inputs = CentredInputs(layer.inputs)
        vars(inputs)["eigen"] = eigen  # fills in the cached property
        return inputs

    def search(relative_tolerance: float) -> SolverResult:
        return lowest_rank(
            *(geometry(), layer.targets, layer.radius(relative_tolerance)),
            activation=layer.activation,
            warm_start=layer.start,
        )

    def fit(rank: int) -> tuple[Tensor, Tensor]:
        # Begins at the truncation in the metric of the inputs, that is, at the closed form.
        return refit_low_rank(
            *(geometry(), layer.targets, layer.start.weight, layer.start.bias),
            rank=rank,
            activation=layer.activation,
        )

    common = {"norm": "rank", "solver": "ours", **layer.shape}
    rows, ranks = [], {}
    for relative_tolerance in settings.relative_tolerances:
        pair, seconds, found = _median_by_pairs(layer, partial(search, relative_tolerance))
        ranks[relative_tolerance] = rank = int(found.objective)
        row = {"case": "search", **common, "rank": rank}
        row |= {"relative_tolerance": relative_tolerance, "pair_seconds": pair}
        error = _relative_error(layer, found.weight, found.bias)
        rows.append({**row, **_numbers(found), "seconds": seconds, "relative_error": error})
        log.info(
            "tolerance %g: rank %d in %.2f s, %.1f pairs, %d iterations",
            *(relative_tolerance, rank, seconds, seconds / pair, found.iterations),
        )
    rank = ranks[settings.one_rank_at]
    pair, seconds, (weight, bias) = _median_by_pairs(layer, partial(fit, rank))
    error = _relative_error(layer, weight, bias)
    row = {"case": "one rank", **common, "rank": rank}
    rows.append({**row, "pair_seconds": pair, "seconds": seconds, "relative_error": error})
    log.info("rank %d: error %.4f in %.2f s, %.1f pairs", rank, error, seconds, seconds / pair)
    lower, inputs = rank - 1, geometry()
    for seed in range(settings.other_starts):
        error = _error_from_random(layer, inputs, lower, seed)
        rows.append({"case": "other start", **common, "rank": lower, "relative_error": error})
        log.info("rank %d from random weights: error %.5f", lower, error)
    return rows


def _error_from_random(layer: Layer, inputs: CentredInputs, rank: int, seed: int) -> float:
    """The relative error at which fits of a rank end that begin at a random weight.

    Each fit is held near its own beginning, in directions that the data hardly show, so the next
    one begins where it ended.
    """
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(layer.targets.shape[1], layer.inputs.shape[1], generator=random)
    weight = weight.to(layer.inputs) / layer.inputs.shape[1] ** 0.5
    bias = layer.targets.mean(dim=0)
    error, before = _relative_error(layer, weight, bias), math.inf
    while error < (1 - _SETTLED) * before:
        weight, bias = refit_low_rank(
            *(inputs, layer.targets, weight, bias),
            rank=rank,
            activation=layer.activation,
            tolerance=_SETTLED,
        )
        error, before = _relative_error(layer, weight, bias), error
    return error


def growth(cfg: DictConfig, device: torch.device) -> list[dict]:
    """Time against in_features, out_features and samples."""
    settings = cfg.growth
    rows = []
    for norm, shape in itertools.product(SOLVERS, settings.layers):
        layer = made_up_layer(*shape, device=device)
        rows.append(_ours(layer, norm, settings.relative_tolerance, settings.gap))
        rows[-1]["case"] = "growth"
        log.info("%s %s: %.2f s", norm, list(shape), rows[-1]["seconds"])
    return rows


def memory(cfg: DictConfig, device: torch.device) -> list[dict]:
    """Peak memory of a solve, the data included, against the bytes of inputs and targets.

    Read from /proc, so on Linux only.
    """
    layer = trained_layer(cfg, device, cfg.memory.samples)
    radius = layer.radius(cfg.layer.relative_tolerance)
    rows = []
    for norm in SOLVERS:
        peak = peak_bytes(layer, norm, radius, cfg.layer.gap)
        row = {"norm": norm, **layer.shape, "data_bytes": _data_bytes(layer), "peak_bytes": peak}
        rows.append({"case": "memory", "solver": "ours", **row})
        log.info("%s: peak of %.2f times the data", norm, peak / _data_bytes(layer))
    return rows


def large_layers(cfg: DictConfig, device: torch.device) -> list[dict]:
    """Layers of the size of VGG-16's and AlexNet's heads."""
    rows = []
    for norm, shape in itertools.product(SOLVERS, cfg.large.layers):
        layer = made_up_layer(*shape, device=device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        row = _ours(layer, norm, cfg.large.relative_tolerance, cfg.large.gap, repetitions=1)
        if device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
            row["data_bytes"] = _data_bytes(layer)
        rows.append({**row, "case": "large"})
        log.info("%s %s: %.1f s, gap %.1e", norm, list(shape), row["seconds"], row["relative_gap"])
    return rows


PARTS: dict[str, Callable[[DictConfig, torch.device], list[dict]]] = {
    "layer": one_layer,
    "path": tolerance_path,
    "lowest_rank": rank_search,
    "growth": growth,
    "memory": memory,
    "reference": against_cone_solvers,
    "large": large_layers,
}
FIGURES = {"convergence": ("layer", plot.convergence), "scaling": ("reference", plot.scaling)}


# --- the targets -----------------------------------------------------------------------------


def measured_targets(table: pd.DataFrame) -> pd.DataFrame:
    """What is aimed at, what was measured, and whether it was met. Unmeasured ones are left out."""
    found = [target for target in _all_targets(table) if target["measured"] is not None]
    for target in found:
        above, limit = target.pop("at_least", None), target.pop("at_most", None)
        met = target["measured"] >= above if limit is None else target["measured"] <= limit
        target["target"] = f">= {above:g}" if limit is None else f"<= {limit:g}"
        prefix = "> " if target.pop("unfinished", False) else ""
        target["measured"] = f"{prefix}{target['measured']:.3g}"
        target["met"] = "yes" if met else "no"
    return pd.DataFrame(found, columns=["what", "target", "measured", "met"])


def _all_targets(table: pd.DataFrame) -> list[dict]:
    def value(column: str, **choice) -> float | None:
        rows = table
        for key, wanted in choice.items():
            rows = rows[rows[key] == wanted] if key in rows else rows.iloc[:0]
        return rows[column].iloc[-1] if len(rows) and column in rows else None

    def ratio(above: float | None, below: float | None) -> float | None:
        return None if above is None or below is None else above / below

    def speedup(solver: str, size: int, samples: int) -> float | None:
        case = {"part": "reference", "case": solver, "in_features": size, "samples": samples}
        return ratio(
            value("seconds", solver=solver, **case), value("seconds", solver="ours", **case)
        )

    targets = [
        {
            "what": "100 x 100, 1000 samples, gap 1e-4: times as fast as SCS",
            "measured": speedup("SCS", 100, 1000),
            "at_least": 200,
        },
        {
            "what": "50 x 50, 200 samples, gap 1e-6: times as fast as Clarabel",
            "measured": speedup("CLARABEL", 50, 200),
            "at_least": 500,
        },
    ]
    for norm, most in (("nuclear", 200), ("l1", 160)):
        case = {"part": "layer", "case": "solve", "norm": norm}
        seconds = value("seconds", solver="ours", **case)
        pair = value("pair_seconds", solver="ours", **case)
        pairs = ratio(seconds, pair)
        alone, path = (
            value("seconds", part="path", case=name, norm=norm) for name in ("one", "path of 8")
        )
        plain = _better_plain(table, norm)
        targets += [
            {"what": f"trained layer, {norm}: pairs", "measured": pairs, "at_most": most},
            {
                "what": f"trained layer, {norm}: pairs an iteration, checks included",
                "measured": ratio(_seconds_an_iteration(table, norm), pair),
                "at_most": 1.6,
            },
            {
                "what": f"trained layer, {norm}: times as fast as the better plain method",
                "measured": ratio(plain["seconds"], seconds),
                "unfinished": plain["status"] != "converged",
                "at_least": 10,
            },
            {
                "what": f"path of 8 tolerances, {norm}: times one solve",
                "measured": ratio(path, alone),
                "at_most": 3,
            },
            {
                "what": f"peak memory, {norm}: times inputs and targets",
                "measured": ratio(
                    *(value(c, part="memory", norm=norm) for c in ("peak_bytes", "data_bytes"))
                ),
                "at_most": 4,
            },
        ]
    one_rank, searches = (
        _pairs(table, part="lowest_rank", case=case) for case in ("one rank", "search")
    )
    return [
        *targets,
        {"what": ONE_RANK, "measured": max(one_rank, default=None), "at_most": 12},
        {"what": RANK_SEARCH, "measured": max(searches, default=None), "at_most": 50},
        {
            "what": "VGG-16 head, layer 1, nuclear: seconds",
            "measured": value("seconds", part="large", norm="nuclear", in_features=25088),
            "at_most": 120,
        },
    ]


def _pairs(table: pd.DataFrame, part: str, case: str) -> list[float]:
    """The time of each row of a case, in pairs."""
    rows = table[(table["part"] == part) & (table["case"] == case)]
    return list(rows["seconds"] / rows["pair_seconds"]) if len(rows) else []


def _seconds_an_iteration(table: pd.DataFrame, norm: str) -> float | None:
    """What the trace's last iterations took beyond its first, so set-up and last proof apart."""
    trace = table[(table["part"] == "layer") & (table["case"] == "trace")]
    trace = trace[(trace["norm"] == norm) & (trace["solver"] == "ours")]
    if trace["iterations"].nunique() < 2:
        return None
    first, last = trace.iloc[0], trace.iloc[-1]
    return (last["seconds"] - first["seconds"]) / (last["iterations"] - first["iterations"])


def _better_plain(table: pd.DataFrame, norm: str) -> dict:
    """The plain method's run that was done first, or none."""
    runs = table[(table["part"] == "layer") & (table["case"] == "solve") & (table["norm"] == norm)]
    runs = runs[runs["solver"].str.startswith("plain")].sort_values(["status", "seconds"])
    return runs.iloc[0].to_dict() if len(runs) else {"seconds": None, "status": "converged"}


# --- what is measured ------------------------------------------------------------------------


def made_up_layer(
    in_features: int,
    out_features: int,
    samples: int,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Layer:
    """A layer with ReLU whose inputs and weight have spectra that decay like 1 / (1 + k / 10)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    def decay(count: int) -> Tensor:
        return 1 / (1 + torch.arange(count, device=device, dtype=dtype) / 10)

    inputs = (normal(samples, in_features) * decay(in_features)) @ normal(in_features, in_features)
    inputs.div_(inputs.square().mean().sqrt())
    inner = min(in_features, out_features)
    weight = (normal(out_features, inner) * decay(inner)) @ normal(inner, in_features)
    targets = torch.mm(inputs, weight.T)
    scale = targets.square().mean().sqrt()
    bias = 0.1 * normal(out_features)
    targets = targets.div_(scale).add_(bias).relu_()
    return Layer(inputs, targets, "relu", WarmStart(weight.div_(scale), bias))


def trained_layer(cfg: DictConfig, device: torch.device, samples: int) -> Layer:
    """A layer of a trained network on its calibration samples, dead inputs and outputs left out."""
    network, _ = load_network(cfg, device)
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    calibration = instantiate(cfg.dataset).calibration(samples, cfg.seed)
    (layer,) = capture_layers(network, calibration, layers=[names[cfg.layer.position]]).layers
    live_in, live_out = layer.live_in, layer.live_out
    start = WarmStart(layer.weight[live_out][:, live_in], layer.bias[live_out])
    return Layer(layer.live_inputs.inputs, layer.targets[:, live_out], layer.activation, start)


def pair_seconds(layer: Layer) -> float:
    """Median time of X Wt and Rt X."""
    weight = layer.targets.new_ones(layer.targets.shape[1], layer.inputs.shape[1])
    times = []
    for _ in range(_REPETITIONS):
        _synchronise(layer.inputs.device)
        started = time.perf_counter()
        fitted = layer.inputs @ weight.T
        fitted.T @ layer.inputs
        _synchronise(layer.inputs.device)
        times.append(time.perf_counter() - started)
    return median(times)


def _median_by_pairs(
    layer: Layer, solve: Callable[[], _Result], repetitions: int = 3
) -> tuple[float, float, _Result]:
    """Of some runs the median by pairs, which are measured anew before each.

    Returns the time of a pair, that of the run, and its result.
    """
    timed = []
    for _ in range(repetitions):
        pair = pair_seconds(layer)
        started = time.perf_counter()
        result = solve()
        _synchronise(layer.inputs.device)
        timed.append((pair, time.perf_counter() - started, result))
    return sorted(timed, key=lambda each: each[1] / each[0])[repetitions // 2]


def peak_bytes(layer: Layer, norm: str, radius: float, gap: float) -> int:
    """Peak resident memory of one solve in a process of its own, beyond what that starts with.

    The data count as part of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        tensors = {"inputs": layer.inputs, "targets": layer.targets, "weight": layer.start.weight}
        tensors |= {"bias": layer.start.bias}
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            grown = pool.apply(_grown_bytes, (path, norm, radius, layer.activation, gap))
    return grown + _data_bytes(layer)


def _grown_bytes(path: Path, norm: str, radius: float, activation: str, gap: float) -> int:
    """How far a solve takes the resident memory of this process, its data apart."""
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    small = torch.randn(64, 64)
    (small @ small).sum(), torch.linalg.eigh(small @ small.T)  # loads what libraries load lazily
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    SOLVERS[norm](
        *(tensors["inputs"], tensors["targets"], radius),
        activation=activation,
        tolerance=gap,
        warm_start=WarmStart(tensors["weight"], tensors["bias"]),
    )
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    """Memory of this process, now (VmRSS) or at its peak (VmHWM), as Linux tells it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def _ours(
    layer: Layer, norm: str, relative_tolerance: float, gap: float, repetitions: int = 3
) -> dict:
    """The median of some solves by pairs, as a row."""
    solve = partial(_solve, layer, norm, relative_tolerance, gap)
    pair, _, result = _median_by_pairs(layer, solve, repetitions)
    return {
        "norm": norm,
        "solver": "ours",
        **layer.shape,
        "relative_tolerance": relative_tolerance,
        "gap_asked": gap,
        "pair_seconds": pair,
        **_numbers(result),
    }


def _solve(
    layer: Layer, norm: str, relative_tolerance: float, gap: float, limit: int = 20_000
) -> SolverResult:
    try:
        return SOLVERS[norm](
            *(layer.inputs, layer.targets, layer.radius(relative_tolerance)),
            activation=layer.activation,
            tolerance=gap,
            max_iterations=limit,
            warm_start=layer.start,
        )
    except ConvergenceError as error:
        return error.result


def _cone_solver(layer: Layer, solver: str, gap: float, settings: DictConfig) -> dict:
    """The first accuracy at which the certificate agrees; if none does, the last one's numbers."""
    for accuracy in settings.accuracies:
        try:
            result = solve_reference(
                *(layer.inputs, layer.targets, layer.radius(settings.relative_tolerance)),
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
        **_numbers(result),
    }


def _plain(layer: Layer, norm: str, settings: DictConfig, penalty: float) -> list[dict]:
    """The plain method's trace, until its certificate is within the gap or its time is up."""
    radius = layer.radius(settings.relative_tolerance)
    outputs = OutputSet(layer.targets, radius, layer.activation, "nettrim")
    begun = time.perf_counter()
    iterates = plain_admm(
        NORMS[norm], outputs, layer.inputs, layer.start.weight, layer.start.bias, penalty
    )
    rows, seconds = [], 0.0
    for iteration, (weight, bias, dual) in enumerate(iterates, start=1):
        if iteration % _ITERATIONS_A_JUDGEMENT:
            continue
        _synchronise(layer.inputs.device)
        seconds += time.perf_counter() - begun
        proof = certify(
            *(weight, bias, dual, layer.inputs, layer.targets, radius),
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


def _numbers(result: SolverResult) -> dict:
    columns = ("iterations", "seconds", "relative_gap", "violation")
    values = {column: getattr(result, column) for column in columns}
    return {**values, "status": result.status.value}


def _relative_error(layer: Layer, weight: Tensor, bias: Tensor) -> float:
    """||D||_F of a weight's outputs, in the sense of the hinge set, relative to the targets'."""
    outputs = OutputSet(layer.targets, 0.0, layer.activation, "hinge")
    return outputs.violation(torch.addmm(bias, layer.inputs, weight.T))


def _data_bytes(layer: Layer) -> int:
    return layer.inputs.nbytes + layer.targets.nbytes


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _replace_part(path: Path, part: str, rows: pd.DataFrame) -> None:
    """Put one part's rows into the table in place of its earlier ones."""
    if path.is_file():
        earlier = pd.read_csv(path)
        rows = pd.concat([earlier[earlier["part"] != part], rows], ignore_index=True)
    order = list(PARTS)
    rows = rows.sort_values("part", key=lambda parts: parts.map(order.index), kind="stable")
    write_whole(path, lambda scratch: rows.to_csv(scratch, index=False, float_format="%.6g"))


if __name__ == "__main__":
    main()
