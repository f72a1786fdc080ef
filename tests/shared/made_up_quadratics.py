"""Made-up quadratics of layers, and a network on which a sparse method keeps its promise or not."""

import itertools
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import ddlr
from ddlr import CompressionResult
from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs
from ddlr.method import Method
from ddlr.problem import WarmStart
from ddlr.quadratic import OutputQuadratic


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def quadratic_of(
    out_features: int, in_features: int, *, seed: int, common: float = 1.0, moved: float = 0.0
) -> OutputQuadratic:
    """Of a random layer with inputs of unlike sizes that have a `common` part.

    `moved` says how far its inputs are from those that gave the targets, as behind others.
    """
    original = normal(8 * in_features, in_features, seed=seed)
    original = original + common * normal(len(original), 1, seed=seed + 1000)
    original = original * normal(in_features, seed=seed + 2000).exp()
    start = WarmStart(
        normal(out_features, in_features, seed=seed + 3000), normal(out_features, seed=seed + 4000)
    )
    targets = original @ start.weight.T + start.bias
    inputs = original + moved * normal(*original.shape, seed=seed + 5000)
    outputs = OutputSet(targets, 0.0, "none", "hinge")
    return OutputQuadratic.of(CentredInputs(inputs), outputs, start, 0.01)


def orthonormal_quadratic(weight: Tensor) -> OutputQuadratic:
    """||W - weight||_F^2: inputs are orthonormal, and there is no ridge."""
    out_features, in_features = weight.shape
    gram = torch.eye(in_features, dtype=weight.dtype)
    means = weight.new_zeros(in_features), weight.new_zeros(out_features)
    return OutputQuadratic(gram, weight, *means, penalty=0.0)


def magnitude_pruned(weight: Tensor, nonzeros: int) -> Tensor:
    threshold = weight.abs().flatten().sort(descending=True).values[nonzeros - 1]
    return weight * (weight.abs() >= threshold)


def supports(rows: int, columns: int, nonzeros: int) -> Iterator[Tensor]:
    """All of them, as masks."""
    for places in itertools.combinations(range(rows * columns), nonzeros):
        mask = torch.zeros(rows * columns, dtype=torch.bool)
        mask[list(places)] = True
        yield mask.view(rows, columns)


def least_squares(quadratic: OutputQuadratic, support: Tensor) -> Tensor:
    """The best weight on a support, from one system for the whole layer."""
    places = support.flatten().nonzero()[:, 0]
    whole = torch.kron(torch.eye(len(support), dtype=torch.float64), quadratic.gram)
    weight = torch.zeros(support.numel(), dtype=torch.float64)
    weight[places] = torch.linalg.solve(whole[places][:, places], quadratic.cross.flatten()[places])
    return weight.view(support.shape)


@torch.no_grad()
def compress_made_up(
    method: Method, *, order: str, relu: bool, refit: str = "none", tolerance: float = 0.2
) -> CompressionResult:
    """Compress a random network of two layers, and assert each layer's promise anew in float64."""
    torch.manual_seed(0)
    between = nn.ReLU() if relu else nn.Identity()
    layers = OrderedDict(fc1=nn.Linear(12, 16), between=between, fc2=nn.Linear(16, 6))
    model, inputs = nn.Sequential(layers).double(), normal(120, 12, seed=0)
    result = ddlr.compress_network(
        model, inputs, method, relative_tolerance=tolerance, order=order, refit=refit
    )
    networks = model, result.model
    seen = {"fc1": (inputs, inputs)}
    seen["fc2"] = tuple(net.between(net.fc1(inputs)) for net in networks)
    for report in result.layers:
        original, stored = (net.get_submodule(report.name) for net in networks)
        original_inputs, compressed_inputs = seen[report.name]
        targets = original(original_inputs)
        given = stored(original_inputs if order == "parallel" else compressed_inputs)
        if relu and report.name == "fc1":
            targets, given = targets.relu(), given.relu()
        bound = report.relative_bound
        missed = (given - targets)[:, ~result.unread[report.name]]
        assert missed.norm() <= bound * (1 + 1e-6) * targets.norm()
        assert tolerance <= bound < (tolerance if order == "parallel" else 2 * tolerance) + 1e-9
        assert report.nonzeros == int((stored.weight != 0).sum()) < stored.weight.numel()
    return result
