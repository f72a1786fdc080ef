"""OSSCAR's choice of a layer's inputs, followed by the activation-aware SVD on those that stay.

An input stays or goes as a whole column of the weight. The search knows the layer by its quadratic
(`ddlr.quadratic.OutputQuadratic`) alone: it takes inputs away in steps, and then swaps inputs in
and out while the loss falls.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ddlr.compression import refit_rank, store_selected
from ddlr.constraints import OutputSet
from ddlr.input_selection import truncate_on_inputs
from ddlr.inputs import CentredInputs
from ddlr.method import Method
from ddlr.problem import WarmStart
from ddlr.quadratic import OutputQuadratic
from ddlr.reduced_rank import RIDGE
from ddlr.result import SolverResult, SolverStatus
from ddlr.sizes import fewest_stored

_KEPT_PER_STAGE = 0.85
_REMOVAL_STEPS = 10  # of a stage
_SWAP_ROUNDS = 20  # of a stage, as in the authors' code
_ROUNDING = 1e-9  # of what the inputs explain: a smaller gain is none


@torch.no_grad()
def prune_inputs(
    inputs: CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str,
    warm_start: WarmStart,
    ridge: float = RIDGE,
) -> SolverResult:
    """Find the layer on some of its inputs, of low rank there, that stores the fewest weights.

        minimise  weights(rank(W), inputs used by W)   subject to ||D||_F <= radius

    over one weight for each number of inputs, every number being 85 % of the one before. For a
    number of inputs the search chooses those with which the quadratic is least, see `remove_inputs`
    and `swap_inputs`. The weight is refitted on them, and truncated to the lowest rank within the
    radius in the metric of the inputs. D is the deviation of `OutputSet` with the hinge constraint.

    Parameters
    ----------
    inputs : CentredInputs of shape (samples, in_features)
    targets : Tensor, shape (samples, out_features)
        Output of the original layer, after its activation.
    radius : float
        Bound on the Frobenius norm of the deviation, in units of `targets`.
    activation : {"relu", "none"}
    warm_start : WarmStart
        Weight and bias of the original layer.
    ridge : float
        Of the quadratic, relative to the mean eigenvalue of the centred inputs' Gram matrix.

    Returns
    -------
    SolverResult
        `objective` is the number of weights, `iterations` that of the numbers of inputs tried;
        columns of `weight` are zero for inputs that are left out. The `warm_start` itself where
        nothing smaller is within the radius. The status is "fitted".

    References
    ----------
    Meng, Ibrahim, Behdin, Hazimeh, Ponomareva and Mazumder (2024), OSSCAR, ICML,
    arXiv 2403.12983, for the choice of inputs. The low rank behind it is ours.
    """
    started = time.perf_counter()
    outputs = OutputSet(targets, radius, activation, "hinge")
    quadratic = OutputQuadratic.of(inputs, outputs, warm_start, ridge)
    layer, size, stages = warm_start, warm_start.weight.numel(), 0
    constant = WarmStart(torch.zeros_like(warm_start.weight), outputs.best_constant_output())
    if not outputs.violation(constant.bias.expand_as(targets)):
        layer, size = constant, 0
    elif quadratic.penalty:  # else the inputs do not vary
        for stage in _stages(inputs, outputs, quadratic):
            stages += 1
            if stage.size < size:
                layer, size = stage.on_all_inputs(inputs), stage.size
    return SolverResult(
        weight=layer.weight,
        bias=layer.bias,
        status=SolverStatus.FITTED,
        iterations=stages,
        objective=float(size),
        lower_bound=math.nan,
        relative_gap=math.nan,
        violation=outputs.violation(torch.addmm(layer.bias, inputs.inputs, layer.weight.T)),
        dual=targets.new_empty(0),
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Stage:
    """The inputs that stay, by index, with a layer on them within the radius, and its size."""

    kept: Tensor
    layer: WarmStart
    size: int

    def on_all_inputs(self, inputs: CentredInputs) -> WarmStart:
        weight = inputs.inputs.new_zeros(len(self.layer.weight), inputs.inputs.shape[1])
        weight[:, self.kept] = self.layer.weight
        return WarmStart(weight, self.layer.bias)


def _stages(
    inputs: CentredInputs, outputs: OutputSet, quadratic: OutputQuadratic
) -> Iterator[_Stage]:
    """Layers on all inputs, then on fewer and fewer, while one is within the radius."""
    kept = torch.arange(len(quadratic.gram), device=quadratic.gram.device)
    while True:
        chosen = quadratic.on_inputs(kept)
        factor = torch.linalg.cholesky(chosen.gram)
        weight = torch.cholesky_solve(chosen.cross.T, factor).T.to(inputs.inputs)
        regressed = WarmStart(weight, chosen.bias_of(weight))
        layer, rank, within = truncate_on_inputs(inputs, outputs, kept, regressed, factor)
        if not within:
            return
        yield _Stage(kept, layer, fewest_stored(rank, len(kept), len(weight)))
        number = int(_KEPT_PER_STAGE * len(kept))
        if not number:
            return
        kept = swap_inputs(quadratic, remove_inputs(quadratic, kept, number))


@dataclass(frozen=True)
class Regression:
    """The weight on some inputs at which the quadratic is least.

    Attributes
    ----------
    quadratic : OutputQuadratic
        Of all inputs.
    kept : Tensor, shape (inputs kept,)
        Indices, ascending.
    weight : Tensor, shape (out_features, inputs kept), float64
    inverse : Tensor, shape (inputs kept, inputs kept), float64
        Of the Gram matrix of these inputs.
    """

    quadratic: OutputQuadratic
    kept: Tensor
    weight: Tensor
    inverse: Tensor

    @classmethod
    def on(cls, quadratic: OutputQuadratic, kept: Tensor) -> "Regression":
        chosen = quadratic.on_inputs(kept)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(chosen.gram))
        return cls(quadratic, kept, chosen.cross @ inverse, inverse)

    @cached_property
    def explained(self) -> float:
        """How far the quadratic falls from the weight of zero to this one."""
        return (self.weight * self.quadratic.cross[:, self.kept]).sum().item()

    @property
    def importance(self) -> Tensor:
        """How much the quadratic rises without each input, the others being refitted."""
        return self.weight.square().sum(dim=0) / self.inverse.diagonal()

    def without(self, going: Tensor) -> "Regression":
        """The regression on the other inputs, by a block update of this one.

        `going` is a mask over the inputs kept.
        """
        stays = ~going
        to_others = self.inverse[going][:, stays]
        made_up = torch.linalg.solve(self.inverse[going][:, going], to_others)
        return Regression(
            self.quadratic,
            self.kept[stays],
            self.weight[:, stays] - self.weight[:, going] @ made_up,
            self.inverse[stays][:, stays] - to_others.T @ made_up,
        )


def remove_inputs(quadratic: OutputQuadratic, kept: Tensor, number: int) -> Tensor:
    """Take inputs away until a number of them is left, in at most ten steps.

    In each step those go that matter least once the others are refitted, and the others are
    refitted after it. Ten inputs or fewer go one by one, so that each is the least of all.

    Parameters
    ----------
    quadratic : OutputQuadratic
    kept : Tensor, shape (inputs kept,)
        Indices.
    number : int

    Returns
    -------
    Tensor, shape (number,)
        Indices, ascending.
    """
    regression = Regression.on(quadratic, kept)
    in_a_step = math.ceil((len(kept) - number) / _REMOVAL_STEPS)
    while len(regression.kept) > number:
        importance = regression.importance
        leaving = min(in_a_step, len(importance) - number)
        going = torch.zeros_like(importance, dtype=torch.bool)
        going[importance.topk(leaving, largest=False).indices] = True
        regression = regression.without(going)
    return regression.kept


def swap_inputs(quadratic: OutputQuadratic, kept: Tensor) -> Tensor:
    """Swap inputs that stay for others while the least loss falls.

    In a round the pairs, of an input that goes and one that comes, are ranked by what each alone
    would gain. As many as possible are swapped at once: half as many are tried whenever the loss
    does not fall. The search ends when no single swap lowers the loss, or after 20 rounds.

    Parameters
    ----------
    quadratic : OutputQuadratic
    kept : Tensor, shape (inputs kept,)
        Indices.

    Returns
    -------
    Tensor, shape (inputs kept,)
        Indices, ascending.
    """
    regression, most = Regression.on(quadratic, kept), len(kept)
    for _ in range(_SWAP_ROUNDS):
        going, coming = _swaps(regression, most)
        if not len(going):
            break
        stays = torch.zeros(len(quadratic.gram), dtype=torch.bool, device=kept.device)
        stays[regression.kept] = True
        stays[going], stays[coming] = False, True
        swapped = Regression.on(quadratic, stays.nonzero()[:, 0])
        if swapped.explained > regression.explained:
            regression = swapped
        elif len(going) == 1:  # a gain that was rounding
            break
        else:
            most = len(going) // 2
    return regression.kept


def _swaps(regression: Regression, most: int) -> tuple[Tensor, Tensor]:
    """The inputs that go and those that come for them, the best pairs first; no input twice."""
    gains, others = swap_gains(regression)
    if not len(others):
        return others, others
    gain, partner = gains.max(dim=1)
    order = gain.argsort(descending=True)
    order = order[gain[order] > _ROUNDING * regression.explained]
    pairs: dict[int, int] = {}
    for place, coming in zip(order.tolist(), partner[order].tolist(), strict=True):
        pairs.setdefault(coming, place)
    coming = torch.tensor([*pairs][:most], dtype=torch.int64, device=others.device)
    going = torch.tensor([*pairs.values()][:most], dtype=torch.int64, device=others.device)
    return regression.kept[going], others[coming]


def swap_gains(regression: Regression) -> tuple[Tensor, Tensor]:
    """How far the least loss falls when one input goes and another one comes, for all pairs.

    Input i goes at the price ||W_i||^2 / h_i, with h the diagonal of the inverse H of the Gram
    matrix. What the outputs still lack along input j is R_j, and s_j is what the inputs kept do not
    say of it. Without i these are R_j + W_i C_ij / h_i and s_j + C_ij^2 / h_i, with C the
    regression of the others on the inputs kept, and j then gains the squared norm of the first
    over the second.

    Returns
    -------
    Tensor, shape (inputs kept, others)
        Negative where the loss rises.
    Tensor, shape (others,)
        Indices of the inputs that are not kept.
    """
    quadratic, kept = regression.quadratic, regression.kept
    outside = torch.ones(len(quadratic.gram), dtype=torch.bool, device=kept.device)
    outside[kept] = False
    others = outside.nonzero()[:, 0]
    between = quadratic.gram[kept][:, others]
    coefficients = regression.inverse @ between
    lacking = quadratic.cross[:, others] - regression.weight @ between
    unsaid = quadratic.gram.diagonal()[others] - (between * coefficients).sum(dim=0)
    shift = coefficients / regression.inverse.diagonal()[:, None]
    norms = regression.weight.square().sum(dim=0)[:, None]
    gained = lacking.square().sum(dim=0) + 2 * shift * (regression.weight.T @ lacking)
    gained = (gained + shift.square() * norms) / (unsaid + shift * coefficients)
    return gained - regression.importance[:, None], others


# A layer before one of these is freed from outputs that are not read, as by "fewest_weights".
OSSCAR = Method(
    "osscar",
    prune_inputs,
    store_selected,
    options={"ridge": RIDGE},
    refit=refit_rank,
    refit_options={"ridge": RIDGE},
    drops_unread=True,
)
