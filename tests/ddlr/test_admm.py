"""The splitting iteration: its multipliers are consistent, and its penalties may move."""

import pytest
import torch

from ddlr.admm import Splitting
from ddlr.certificate import certify
from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs
from ddlr.proximal import L1, NUCLEAR
from experiments.methods.cone_solvers import solve_reference
from made_up import made_up_layer

NORMS = {"nuclear": NUCLEAR, "l1": L1}


def make(norm, constraint, samples=40):
    inputs, targets = made_up_layer(samples, 9, 7, seed=1)
    outputs = OutputSet(targets, 0.2 * targets.norm().item(), "relu", constraint)
    return inputs, outputs, Splitting(NORMS[norm], outputs, CentredInputs(inputs), None, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("constraint", ["nettrim", "hinge"])
def test_with_constant_penalties_it_converges_to_the_optimum(norm, constraint):
    inputs, outputs, splitting = make(norm, constraint)
    for _ in range(5000):
        splitting.step()
    weight, bias = splitting.answer()
    best = solve_reference(
        inputs,
        outputs.targets,
        outputs.radius,
        norm=norm,
        constraint=constraint,
        solver="CLARABEL",
    )
    assert NORMS[norm].value(weight) == pytest.approx(best.objective, rel=1e-4)
    assert outputs.violation(inputs @ weight.T + bias) <= 1e-5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("samples", [40, 700])
def test_columns_of_the_dual_variable_sum_to_zero(norm, samples):
    _, _, splitting = make(norm, "hinge", samples)
    for _ in range(20):
        splitting.step()
        assert splitting.dual.sum(dim=0).abs().max() <= 1e-10 * splitting.dual.abs().sum()


@pytest.mark.parametrize("norm", NORMS)
def test_a_penalty_moves_without_a_change_of_the_multiplier(norm):
    inputs, outputs, splitting = make(norm, "hinge")
    moved = set()
    for iteration in range(1, 151):
        splitting.step()
        if iteration % 10:
            continue
        weight, bias = splitting.answer()
        proof = certify(
            weight,
            bias,
            splitting.dual,
            inputs,
            outputs.targets,
            outputs.radius,
            norm=NORMS[norm],
            constraint="hinge",
        )

        def multiplier() -> torch.Tensor:
            governing = splitting.output_governing
            projection = splitting.outputs.project(governing)
            return splitting.output_penalty * (governing - projection)

        # The margin may shrink with the first certificate, which moves the set itself.
        splitting._afford_margin(proof.sensitivity)
        before, penalty = multiplier(), splitting.output_penalty
        splitting.rebalance(iteration, proof)
        assert torch.allclose(multiplier(), before, rtol=1e-9, atol=1e-12)
        moved.add(splitting.output_penalty != penalty)
    assert True in moved
