"""Sums and products of two layers: what they give, store and count, and how they are filled."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import ddlr
from ddlr import LowRankLinear, PivotedLinear, SparseFactors, SparseLinear, SparsePlusLowRank
from ddlr.calls import as_batches
from ddlr.dead_weights import remove_dead_weights
from ddlr.layers import store_linear
from ddlr.method import Method
from ddlr.result import SolverResult, SolverStatus
from ddlr.sizes import csr_bytes, layer_size
from ddlr.storing import on_all_features, on_live_features

OUT, IN, INNER, RANK = 60, 90, 40, 5
NOT_SOLVED = {
    "status": SolverStatus.FITTED,
    "iterations": 0,
    "objective": 1.0,
    "lower_bound": float("nan"),
    "relative_gap": float("nan"),
    "violation": 0.0,
    "dual": torch.empty(0),
    "seconds": 0.0,
}


def sparse(rows: int, columns: int, kept: float = 0.08, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    return matrix * (torch.rand(rows, columns, generator=generator) < kept)


def low_rank(rows: int, columns: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(rows, rank, generator=generator),
        torch.randn(rank, columns, generator=generator),
    )


def sum_form() -> tuple[SparsePlusLowRank, Tensor]:
    left, right = low_rank(OUT, IN, RANK)
    rest, bias = sparse(OUT, IN), torch.arange(float(OUT))
    parts = store_linear(rest, None), LowRankLinear.from_weight(left @ right, bias, RANK)
    return SparsePlusLowRank(*parts), rest + left @ right


def product_form() -> tuple[SparseFactors, Tensor]:
    left, right = sparse(OUT, INNER, seed=2), sparse(INNER, IN, seed=3)
    return SparseFactors.from_factors(left, right, torch.arange(float(OUT))), left @ right


FORMS = {"sum": sum_form, "product": product_form}


@pytest.fixture(params=FORMS)
def form(request) -> tuple[nn.Module, Tensor]:
    return FORMS[request.param]()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(2, 7, IN, generator=torch.Generator().manual_seed(5))


def test_it_gives_what_a_dense_layer_of_its_weight_gives(form, inputs):
    layer, weight = form
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert torch.allclose(layer.weight, weight, atol=1e-5)
    assert torch.equal(layer.bias, torch.arange(float(OUT)))
    expected = inputs.double() @ weight.double().T + torch.arange(float(OUT))
    assert torch.allclose(layer(inputs), expected.float(), atol=1e-4)
    assert torch.allclose(layer.dense()(inputs), expected.float(), atol=1e-4)


def test_a_sum_counts_nonzeros_and_the_degrees_of_freedom_of_its_rank():
    layer, _ = sum_form()
    size, nonzeros = layer_size(layer), int((layer.sparse.weight != 0).sum())
    assert size.form == "sparse_low_rank"
    assert size.parameters == nonzeros + RANK * (OUT + IN - RANK)
    both = layer_size(layer.sparse).bytes + layer_size(layer.low_rank).bytes
    assert size.bytes == both


def test_a_product_counts_the_nonzeros_of_both_factors():
    layer, _ = product_form()
    size = layer_size(layer)
    nonzeros = [int((part.weight != 0).sum()) for part in (layer.first, layer.last)]
    assert (size.form, size.parameters) == ("sparse_factors", sum(nonzeros))
    assert size.bytes <= csr_bytes(nonzeros[0], INNER, IN) + csr_bytes(nonzeros[1], OUT, INNER)


def test_what_does_not_count_in_a_product_is_not_stored():
    left, right = sparse(OUT, INNER, 0.5), sparse(INNER, IN, 0.5)
    left[:, 3], right[8] = 0, 0
    layer = SparseFactors.from_factors(left, right, None)
    assert layer.first.out_features == layer.last.in_features == INNER - 2
    assert torch.allclose(layer.weight, left @ right, atol=1e-5)
    assert layer.bias is None


def test_a_compact_copy_has_compact_parts_and_gives_the_same(form, inputs):
    layer, _ = form
    model = nn.Sequential(layer, nn.ReLU())
    small = ddlr.compact(model)
    assert type(small[0]) is type(layer) and model[0] is layer
    assert torch.allclose(small(inputs), model(inputs), atol=1e-4)
    assert layer_size(small[0]) == layer_size(layer)
    kinds = [type(part) for part in small[0].parts]
    wanted = {
        SparsePlusLowRank: [SparseLinear, PivotedLinear],
        SparseFactors: [SparseLinear, SparseLinear],
    }
    assert kinds == wanted[type(layer)]
    weights = sum(p.numel() for name, p in small.named_parameters() if "bias" not in name)
    assert weights == layer_size(layer).parameters
    again = ddlr.compact(small)
    assert [type(each) for each in again.modules()] == [type(each) for each in small.modules()]


@pytest.mark.parametrize("compact", [True, False])
def test_it_comes_back_from_a_file(form, inputs, tmp_path, compact):
    model = nn.Sequential(OrderedDict(fc1=form[0], relu=nn.ReLU(), fc2=nn.Linear(OUT, 3))).eval()
    path = tmp_path / "small.safetensors"
    ddlr.save(model, path, compact=compact)
    expected = ddlr.compact(model) if compact else model
    original = nn.Sequential(
        OrderedDict(fc1=nn.Linear(IN, OUT), relu=nn.ReLU(), fc2=nn.Linear(OUT, 3))
    )
    for loaded in (ddlr.load(path), ddlr.load(path, original)):
        assert [type(each) for each in loaded.modules()] == [
            type(each) for each in expected.modules()
        ]
        assert torch.equal(loaded(inputs), expected(inputs))
    bare = model.state_dict()
    assert path.stat().st_size < sum(each.nbytes for each in bare.values())


@pytest.mark.parametrize("compact", [True, False])
def test_a_refit_of_the_network_keeps_zeros_and_moves_both_parts(form, compact):
    layer, _ = form
    inputs = torch.randn(60, IN, generator=torch.Generator().manual_seed(5))
    compressed = nn.Sequential(OrderedDict(fc=layer))
    original = nn.Sequential(OrderedDict(fc=copy.deepcopy(layer).dense()))
    with torch.no_grad():
        original.fc.weight.mul_(1.2)
    if compact:
        compressed = ddlr.compact(compressed)
    refitted = ddlr.refit_network(
        original, compressed, inputs, ["fc"], output="values", epochs=5, learning_rate=1e-2
    )

    def error(model: nn.Module) -> float:
        return (model(inputs) - original(inputs)).norm().item()

    assert error(refitted) < 0.9 * error(compressed)
    for before, after in zip(compressed.fc.parts, refitted.fc.parts, strict=True):
        assert not torch.equal(before.weight, after.weight)
        if not isinstance(before, LowRankLinear | PivotedLinear):
            assert torch.equal(before.weight != 0, after.weight != 0)
    assert layer_size(refitted.fc) == layer_size(compressed.fc)


@pytest.mark.parametrize("name", FORMS)
def test_what_nothing_reads_is_removed_from_both_parts(name):
    layer, _ = FORMS[name]()
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(OUT, 4))
    with torch.no_grad():
        model[2].weight[:, :50] = 0
    inputs = torch.randn(9, IN)
    before, size = model(inputs), layer_size(layer).parameters
    unread = remove_dead_weights(model, [("0", "2")], as_batches(inputs))
    assert torch.allclose(model(inputs), before, atol=1e-4)
    assert unread["0"].sum() > 40 and not layer.weight[:50].any()
    assert layer_size(layer).parameters < 0.7 * size
    if name == "product":  # no weight is left that does not count in the product
        first, last = layer.first.weight != 0, layer.last.weight != 0
        assert torch.equal(first.any(dim=1), last.any(dim=0))


def test_a_constant_unit_before_it_is_folded_into_its_bias(form):
    layer, _ = form
    model = nn.Sequential(nn.Linear(4, IN), nn.ReLU(), layer)
    with torch.no_grad():
        model[0].weight[::2] = 0
    inputs = torch.randn(9, 4)
    before = model(inputs)
    remove_dead_weights(model, [("0", "2")], as_batches(inputs))
    assert torch.allclose(model(inputs), before, atol=1e-3)
    assert not layer.weight[:, ::2].any() and layer.weight[:, 1::2].any()


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"sparse has shape \(3, 4\) and low_rank has shape"):
        SparsePlusLowRank(nn.Linear(4, 3), nn.Linear(3, 4))
    with pytest.raises(ValueError, match="first has 3 outputs and last has 4 inputs"):
        SparseFactors(nn.Linear(4, 3), nn.Linear(4, 3))


# --- from a solution to the layer that stores it ---------------------------------------------


def solve_by_parts(inputs, targets, radius, *, activation, warm_start) -> SolverResult:
    """The original layer as a product with an orthogonal matrix and its transpose."""
    weight = warm_start.weight
    turn = torch.linalg.qr(torch.randn(len(weight), len(weight))).Q
    parts = {"left": turn, "right": turn.T @ weight}
    return SolverResult(weight=weight, bias=warm_start.bias, parts=parts, **NOT_SOLVED)


BY_PARTS = Method(
    "by_parts",
    solve_by_parts,
    lambda weight, bias, left, right: SparseFactors.from_factors(left, right, bias),
    parts={"left": (True, False), "right": (False, True)},
    refit=lambda problem, solved: (
        2 * solved.weight,
        solved.bias,
        {**solved.parts, "left": 2 * solved.parts["left"]},
    ),
)


@pytest.mark.parametrize("refit", ["none", "layer"])
def test_parts_reach_the_stored_layer_past_inputs_and_outputs_that_are_always_zero(refit):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)), torch.rand(40, 9)
    inputs[:, [0, 4]] = 0
    with torch.no_grad():
        model[0].bias.fill_(3.0)
        model[0].bias[[1, 6]] = -100.0
    result = ddlr.compress_network(
        model, inputs, BY_PARTS, relative_tolerance={"0": 0.1, "2": 0.0}, refit=refit
    )
    live = model[0].weight.detach().clone()
    live[:, [0, 4]], live[[1, 6]] = 0, 0
    stored = result.model[0]
    assert isinstance(stored, SparseFactors)
    wanted = live if refit == "none" else 2 * live
    assert torch.allclose(stored.weight, wanted, atol=1e-5)


def test_parts_are_embedded_along_their_own_sides_and_taken_back():
    live_out, live_in = torch.tensor([True, False, True]), torch.tensor([False, True, True, True])
    # As many inner features as outputs, so that shapes alone do not say which side is which.
    parts = {"left": torch.rand(2, 2), "right": torch.rand(2, 3)}
    solved = SolverResult(
        weight=parts["left"] @ parts["right"], bias=torch.rand(2), parts=parts, **NOT_SOLVED
    )
    full = on_all_features(solved, BY_PARTS, live_out, live_in)
    assert (full.parts["left"].shape, full.parts["right"].shape) == ((3, 2), (2, 4))
    assert torch.allclose(full.parts["left"] @ full.parts["right"], full.weight)
    back = on_live_features(full, BY_PARTS, live_out, live_in)
    assert torch.equal(back.weight, solved.weight) and torch.equal(back.bias, solved.bias)
    assert all(torch.equal(back.parts[name], part) for name, part in parts.items())
