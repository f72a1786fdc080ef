"""BALF's allocation: a budget of weights is spread over layers by the energy that ranks keep.

The energy of a layer at rank r is the sum of the r largest squared singular values of its
activation-aware singular value decomposition, relative to the sum of all. Layers with ranks are a
multiple-choice knapsack: the most energy in sum, at a cost in weights. The captured layers are
enough for it; no network is run.

    options = energy_options(captured)
    ddlr.compress_network(
        model, captured, ACTIVATION_SVD, goal=Goal(kept_fraction=0.1, options=options)
    )
"""

import torch

from ddlr.captured import CapturedLayer, CapturedLayers
from ddlr.constraints import OutputSet
from ddlr.goals import Option
from ddlr.sizes import fewest_stored, saves_weights
from experiments.methods.closed_forms import OutputTerms, output_terms

ALLOCATIONS = ("measured", "roots", "energy")


@torch.no_grad()
def energy_options(captured: CapturedLayers) -> dict[str, list[Option]]:
    """What each layer alone offers to a budget, by its energies: ready-made `Goal.options`.

    An option is a rank, from 1 upwards. Its parameters are what a layer of that rank stores, and
    its divergence is the share of the energy that it loses. `ddlr.allocate.frontier` then solves
    the knapsack for all budgets at once: exactly, unless more than 4096 allocations are unbeaten.

    A method is given a tolerance, not a rank. So an option has a tolerance at which
    `experiments.methods.closed_forms.ACTIVATION_SVD` finds its rank: halfway between the error of
    the rank and that of the nearest lower one, so that rounding changes nothing. A rank at which
    the error is no smaller than at a lower rank has no such tolerance, and is left out. Other
    methods may make layers smaller or larger at these tolerances.

    The authors take inputs as they are, count the weights of two factors, and relax the knapsack
    by a Lagrange multiplier. Here inputs are centred beside a free bias, and sizes are those of
    all methods here, see `ddlr.sizes.fewest_stored`.

    Parameters
    ----------
    captured : CapturedLayers

    Returns
    -------
    dict of layer name to list of Option
        The first one is the layer as it is.

    References
    ----------
    Gonzalez-Martinez (2025), BALF: Budgeted Activation-Aware Low-Rank Factorization for
    Fine-Tuning-Free Model Compression, arXiv 2509.25136.
    """
    return {layer.name: _options(layer) for layer in captured.layers}


def _options(layer: CapturedLayer) -> list[Option]:
    """The layer as it is, then ranks that save weights, the highest first."""
    problem = layer.problem(1.0)
    terms = output_terms(problem.inputs, problem.weight, problem.bias)
    outputs = OutputSet(problem.targets, 0.0, problem.activation, "hinge")
    errors = _errors_by_rank(outputs, terms)
    energies = terms.values.double().square()
    lost = (1 - energies.cumsum(dim=0) / energies.sum()).clamp(min=0).tolist()
    out_features, in_features = problem.weight.shape
    options: list[Option] = []
    least = errors[0]
    for rank, error in enumerate(errors[1:], start=1):
        if error >= least or not saves_weights(rank, in_features, out_features):
            continue
        size = fewest_stored(rank, in_features, out_features)
        options.append(Option((error + least) / 2, size, lost[rank - 1]))
        least = error
    return [Option(0.0, layer.weight.numel(), 0.0), *reversed(options)]


def _errors_by_rank(outputs: OutputSet, terms: OutputTerms) -> list[float]:
    """||D||_F relative to the targets at each rank, from 0 upwards."""
    produced = terms.mean.expand_as(outputs.targets).clone()
    errors = [outputs.violation(produced)]
    for rank in range(len(terms.values)):
        produced.addmm_(terms.scores[:, rank : rank + 1], terms.directions.T[rank : rank + 1])
        errors.append(outputs.violation(produced))
    return errors
