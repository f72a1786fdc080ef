"""The cache of solves answers an equal call, and only that, with what was computed before."""

import dataclasses
from functools import partial

import pytest
import torch

import ddlr
from ddlr import ConvergenceError, SolverResult, SolverStatus
from experiments.runs.solves import DiskSolveCache
from experiments.runs.storage import entries


@dataclasses.dataclass(frozen=True)
class Problem:
    """Of no class of the library: the cache is not to know what it is called with."""

    name: str
    inputs: torch.Tensor


def result(weight: torch.Tensor) -> SolverResult:
    return SolverResult(
        weight=weight,
        bias=weight.sum(1),
        status=SolverStatus.CONVERGED,
        iterations=7,
        dual=torch.ones(3),
        objective=0.1,
        lower_bound=float("-inf"),
        relative_gap=float("nan"),
        violation=-1e-30,
        shortfall=0.0,
        seconds=1.5,
    )


@pytest.fixture
def calls() -> list:
    return []


@pytest.fixture
def solver(calls):
    def solve(*arguments, **options) -> SolverResult:
        calls.append(arguments)
        return result(arguments[-1].inputs * options.get("scale", 1.0))

    return solve


PROBLEM = Problem("fc1", torch.arange(6.0).reshape(2, 3))


def test_an_equal_call_is_answered_bit_for_bit_without_the_dual(tmp_path, solver, calls):
    cache = DiskSolveCache(tmp_path, limit_gib=1)
    first = cache(solver, 0.5, PROBLEM, scale=1 / 3)
    equal = dataclasses.replace(PROBLEM, inputs=PROBLEM.inputs.clone())
    second = DiskSolveCache(tmp_path, limit_gib=1)(solver, 0.5, equal, scale=1 / 3)
    assert len(calls) == 1
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert second.dual.numel() == 0
    for field in dataclasses.fields(SolverResult):
        if field.name not in ("weight", "bias", "dual"):
            assert repr(getattr(first, field.name)) == repr(getattr(second, field.name))


def test_a_solution_keeps_its_parts_and_a_refit_depends_on_them(tmp_path):
    cache, weight, asked = DiskSolveCache(tmp_path, limit_gib=1), torch.arange(6.0), []

    def solve(scale: float) -> SolverResult:
        return dataclasses.replace(result(weight[None]), parts={"left": scale * weight})

    def refit(solved: SolverResult) -> SolverResult:
        asked.append(solved)
        return solved

    solved = [cache(solve, scale) for scale in (1.0, 1.0, 2.0)]
    assert [each.parts["left"].tolist() for each in solved] == [
        (scale * weight).tolist() for scale in (1.0, 1.0, 2.0)
    ]
    for each in solved:
        cache(refit, each)
    assert len(asked) == 2


def test_another_call_is_another_entry(tmp_path, solver, calls):
    cache = DiskSolveCache(tmp_path, limit_gib=1)
    nudged = PROBLEM.inputs.clone()
    nudged[0, 0] = torch.finfo(torch.float32).tiny
    variants = [
        ((solver, 0.5, PROBLEM), {}),
        ((solver, 0.5000000001, PROBLEM), {}),
        ((solver, 0.5, dataclasses.replace(PROBLEM, name="fc2")), {}),
        ((solver, 0.5, dataclasses.replace(PROBLEM, inputs=nudged)), {}),
        ((solver, 0.5, dataclasses.replace(PROBLEM, inputs=PROBLEM.inputs.double())), {}),
        ((solver, 0.5, PROBLEM), {"scale": 2.0}),
        ((partial(solver, 0.25), 0.5, PROBLEM), {}),
        ((solver, None, PROBLEM), {}),
        ((solver, (), PROBLEM), {}),
    ]
    for arguments, options in variants * 2:
        cache(*arguments, **options)
    assert len(calls) == len(entries(tmp_path)) == len(variants)


def test_a_solve_that_does_not_converge_is_not_kept(tmp_path, calls):
    def fails(problem: Problem) -> SolverResult:
        calls.append(problem)
        raise ConvergenceError("too slow", result(problem.inputs))

    for _ in range(2):
        with pytest.raises(ConvergenceError, match="too slow"):
            DiskSolveCache(tmp_path, limit_gib=1)(fails, PROBLEM)
    assert len(calls) == 2
    assert entries(tmp_path) == []


def test_a_solve_comes_back_to_the_device_of_its_tensors(tmp_path, solver, calls):
    cache = DiskSolveCache(tmp_path, limit_gib=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    other = PROBLEM.inputs + (device == "cpu")  # another problem, where there is no other device
    there = dataclasses.replace(PROBLEM, inputs=other.to(device))
    for problem in (PROBLEM, there, PROBLEM, there):
        assert cache(solver, 0.5, problem).weight.device == problem.inputs.device
    assert len(calls) == 2


def test_a_solver_of_the_library_is_answered_from_the_disk(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    inputs = torch.randn(60, 8)
    settings = ddlr.Settings(solve_cache=DiskSolveCache(tmp_path, limit_gib=1))
    first, second = (
        ddlr.compress(model, inputs, relative_tolerance=0.3, refit="layer", settings=settings)
        for _ in range(2)
    )
    assert len(entries(tmp_path)) == 4  # a solve and a refit a layer
    assert first.layers == second.layers  # also the times, which are those of the first solve
