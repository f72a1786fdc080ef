"""Layers behind compressed ones: sizes as on the original activations, sums of skip connections."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ddlr
import nettrim
from ddlr.calls import as_batches
from ddlr.cascade import Behind
from ddlr.hooks import capture
from ddlr.skip_connections import layers_in_sums
from doors import outputs_of

SIZES_KEPT = ddlr.Settings(cascade_bound="reached")
TOKENS = ("query", "key", "value", "mixed", "up", "down")


class Block(nn.Module):
    """A transformer's block of one head, of which `TOKENS` are the linear layers, and a head."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.query, self.key, self.value, self.mixed = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.between, self.dropout = nn.LayerNorm(width), nn.Dropout(0.1)
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        scores = self.query(tokens) @ self.key(tokens).transpose(1, 2)
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -1e9)
        attended = scores.softmax(dim=-1) @ self.value(tokens)
        tokens = self.between(self.dropout(self.mixed(attended)) + tokens)
        return self.head(tokens + self.down(functional.gelu(self.up(tokens))))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture
def tokens() -> Tensor:
    """Of a few directions for the most part, as activations are."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(16, 16, generator=generator)
    strengths = 0.7 ** torch.arange(16)
    return torch.randn(160, 5, 16, generator=generator) * strengths @ directions


def test_only_what_is_read_by_a_sum_alone_is_in_a_sum(block, tokens):
    batches = as_batches([tokens[:40], tokens[40:]])
    assert layers_in_sums(block, [*TOKENS, "head"], batches) == {"mixed", "down"}


@pytest.mark.parametrize(
    "combine",
    [
        lambda layer, x: layer(x) - x,
        lambda layer, x: layer(x) * x,
        lambda layer, x: torch.add(x, layer(x), alpha=2),
        lambda layer, x: layer(x) + 1.0,
        lambda layer, x: layer(x) + x[:1],
        lambda layer, x: layer(x + layer(x)) + x,
        lambda layer, x: (lambda y: (y + x) * y)(layer(x)),
        lambda layer, x: (lambda y: (y + x) + (y + 2 * x))(layer(x)),
        lambda layer, x: (lambda y: y + y)(layer(x)),
    ],
)
def test_other_operations_are_no_skip_connections(combine):
    class Combined(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return combine(self.layer, x)

    batches = as_batches(torch.randn(10, 4))
    assert layers_in_sums(Combined(), ["layer"], batches) == frozenset()


class Residual(nn.Module):
    """Two blocks whose layers `second` and `last` are added to what goes past them."""

    def __init__(self, add):
        super().__init__()
        self.add = add
        self.first, self.second, self.up, self.last = (nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.add(self.second(functional.gelu(self.first(tokens))), tokens)
        return self.head(self.add(self.last(functional.gelu(self.up(tokens))), tokens))


@pytest.mark.parametrize(
    "add",
    [
        lambda output, skip: output + skip,
        lambda output, skip: skip + output,
        lambda output, skip: output.add_(skip),
        lambda output, skip: skip.clone().add_(output),
    ],
    ids=["output first", "skip first", "in place", "into the skip"],
)
def test_the_targets_behind_make_up_for_the_skip_connection(add, tokens):
    torch.manual_seed(0)
    model = Residual(add).eval()
    captured = ddlr.capture_layers(model, tokens, layers=["first", "second", "up", "last"])
    compressed = copy.deepcopy(model)
    compressed.second.weight.data *= -3

    def sums(model: nn.Module) -> tuple[Tensor, Tensor]:
        """What reads the layer `last` reads, and the layer's outputs."""
        with torch.no_grad(), capture(model, ["last", "head"], decide=False) as records:
            model(tokens)
        return records["head"].inputs, records["last"].outputs

    behind = Behind(model, captured.layers[1:], captured.batches, made_up=True)
    layer = behind.layer(compressed, "last")
    wanted, _ = sums(model)
    present, added = sums(compressed)
    assert (wanted - present).norm() > 0.1 * wanted.norm()
    torch.testing.assert_close(layer.targets, wanted - (present - added), atol=1e-5, rtol=1e-5)
    plain = Behind(model, captured.layers[1:], captured.batches).layer(compressed, "last")
    assert torch.equal(plain.targets, captured.layers[-1].targets)
    assert (plain.targets - layer.targets).norm() > 0.1 * plain.targets.norm()
    assert torch.equal(plain.inputs, layer.inputs)


def test_each_of_two_layers_with_the_same_inputs_makes_up_for_its_own_sum(tokens):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.one, self.other = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            y = self.before(x)
            return (self.one(x) + y) * (self.other(x) + y.tanh())

    torch.manual_seed(0)
    model = Branches()
    captured = ddlr.capture_layers(model, tokens)
    compressed = copy.deepcopy(model)
    compressed.before.weight.data *= 0.8
    behind = Behind(model, captured.layers[1:], captured.batches, made_up=True)
    moved = [behind.layer(compressed, name).targets for name in ("one", "other")]
    with torch.no_grad():
        before, after = (each.before(tokens.flatten(0, 1)) for each in (model, compressed))
    for change, targets, layer in zip(
        (before - after, before.tanh() - after.tanh()), moved, captured.layers[1:], strict=True
    ):
        torch.testing.assert_close(targets - layer.targets, change, atol=1e-5, rtol=1e-5)


def test_a_sum_that_is_gone_in_the_compressed_network_is_named(tokens):
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
            self.adds = True

        def forward(self, x):
            y = self.one(x)
            return self.last(y) + x if self.adds else self.last(y) * x

    model = Switched()
    captured = ddlr.capture_layers(model, tokens)
    compressed = copy.deepcopy(model)
    compressed.adds = False
    behind = Behind(model, captured.layers[1:], captured.batches, made_up=True)
    with pytest.raises(ValueError, match="layer 'last' is given other samples"):
        behind.layer(compressed, "last")


@pytest.mark.parametrize("door", [ddlr.compress, nettrim.prune])
def test_a_solve_that_does_not_converge_raises_in_cascade_too(door, block, tokens):
    given = {"relative_tolerance": {name: 0.0 for name in (*TOKENS, "head")}, "refit": "layer"}
    # The first is easy: it is the second solve that fails.
    given["relative_tolerance"] |= {"query": 1.0, "down": 0.05}
    settings = ddlr.Settings(cascade_bound="reached", max_iterations=2)
    with pytest.raises(ddlr.ConvergenceError, match="layer 'down'"):
        door(block, tokens, order="cascade", settings=settings, **given)
    told = dataclasses.replace(settings, raise_on_failure=False)
    reports = {
        each.name: each
        for each in door(block, tokens, order="cascade", settings=told, **given).layers
    }
    assert reports["down"].status == "iteration_limit"


def test_tokens_that_do_not_count_are_left_out_of_the_sums_too(block, tokens):
    masks = torch.ones(len(tokens), 5, dtype=torch.int64)
    masks[::2, 3:] = 0
    batches = [{"tokens": tokens[:100], "attention_mask": masks[:100]}]
    batches.append({"tokens": tokens[100:], "attention_mask": masks[100:]})
    captured = ddlr.capture_layers(block, batches, layers=list(TOKENS))
    compressed = copy.deepcopy(block)
    compressed.value.weight.data *= 0.5
    behind = Behind(block, captured.layers, captured.batches, made_up=True)
    layer = behind.layer(compressed, "down")
    assert layer.targets.shape == (int(masks.sum()), 16)
    change = layer.targets - captured.layers[-1].targets
    with torch.no_grad(), capture(block, ["up"], decide=False) as before:
        block(tokens, masks)
    with torch.no_grad(), capture(compressed, ["up"], decide=False) as after:
        compressed(tokens, masks)
    kept = masks.flatten().bool()
    torch.testing.assert_close(change, (before["up"].inputs - after["up"].inputs)[kept])


@pytest.mark.parametrize(
    "door",
    [
        lambda *args, **options: ddlr.compress(*args, method="nuclear", **options),
        lambda *args, **options: ddlr.compress(*args, method="lowest_rank", **options),
        lambda *args, **options: ddlr.compress(*args, method="fewest_weights", **options),
        nettrim.prune,
    ],
    ids=["nuclear", "lowest_rank", "fewest_weights", "prune"],
)
def test_sizes_are_those_of_parallel_order_and_the_network_is_nearer(door, block, tokens):
    given = {"relative_tolerance": 0.25, "refit": "layer"}
    parallel = door(block, tokens, **given)
    result = door(block, tokens, order="cascade", settings=SIZES_KEPT, **given)
    sizes = [(each.name, each.parameters_kept) for each in parallel.layers]
    assert [(each.name, each.parameters_kept) for each in result.layers] == sizes
    assert sum(size for _, size in sizes) < sum(each.parameters_dense for each in result.layers)
    wanted = block(tokens)
    missed, before = ((each.model(tokens) - wanted).norm().item() for each in (result, parallel))
    assert missed < before
    for report in result.layers:
        assert report.relative_bound >= report.relative_tolerance
        assert report.violation < 1e-5


def test_layers_with_the_same_inputs_are_seen_in_one_pass_that_ends_there(block, tokens):
    calls: list[str] = []
    captured = ddlr.capture_layers(block, tokens, layers=list(TOKENS))
    compressed = copy.deepcopy(block)
    for name in (*TOKENS, "head"):
        compressed.get_submodule(name).register_forward_hook(
            lambda *_, name=name: calls.append(name)
        )
    behind = Behind(block, captured.layers, captured.batches)
    attention = [behind.layer(compressed, name) for name in ("query", "key", "value")]
    assert calls == ["query", "key", "value"]
    assert all(layer.inputs is attention[0].inputs for layer in attention)
    assert all(layer.shared is attention[0].shared for layer in attention)
    calls.clear()
    behind.layer(compressed, "up")
    assert calls == ["query", "key", "value", "mixed", "up"]


def test_a_layer_whose_inputs_become_another_layers_outputs_is_seen_by_itself():
    """The same tensor in the original network; behind a compressed layer another one."""

    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.last = (nn.Linear(6, 6) for _ in range(3))
            self.switch = False

        def forward(self, x):
            first = self.one(x)
            return self.last(first + self.other(first if self.switch else x))

    model, inputs = Switched(), torch.randn(50, 6)
    captured = ddlr.capture_layers(model, inputs)
    compressed = copy.deepcopy(model)
    compressed.switch = True
    behind = Behind(model, captured.layers, captured.batches)
    behind.layer(compressed, "one")
    compressed.one.weight.data *= 0.5
    torch.testing.assert_close(behind.layer(compressed, "other").inputs, compressed.one(inputs))


@pytest.mark.parametrize("door", [ddlr.compress, nettrim.prune])
def test_sizes_are_kept_with_a_refit_only(door, block, tokens):
    with pytest.raises(ValueError, match="needs refit='layer'"):
        door(block, tokens, relative_tolerance=0.1, order="cascade", settings=SIZES_KEPT)
    with pytest.raises(ValueError, match="is for order='cascade'"):
        door(block, tokens, relative_tolerance=0.1, refit="layer", settings=SIZES_KEPT)


def test_workers_make_no_difference(block, tokens):
    results = [
        ddlr.compress(
            block,
            tokens,
            relative_tolerance=0.2,
            refit="layer",
            order="cascade",
            settings=ddlr.Settings(cascade_bound="reached", workers=workers),
        )
        for workers in (1, 2)
    ]
    one, two = (outputs_of(each.model, tokens) for each in results)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lowest_rank", "fewest_weights"])
@pytest.mark.parametrize("kept", [0.3, 0.5])
def test_a_goal_of_size_makes_one_network_in_cascade(method, kept, block, tokens):
    """Sizes are those of parallel order, so the others need no passes."""
    given = {"method": method, "refit": "layer", "kept_fraction": kept}
    result = ddlr.compress(block, tokens, order="cascade", settings=SIZES_KEPT, **given)
    parallel = ddlr.compress(block, tokens, **given)
    assert result.goal.tried == 1
    assert result.goal.met
    assert result.goal.measured == pytest.approx(parallel.goal.measured, abs=0.01)
    sizes = sum(each.parameters_kept for each in result.layers)
    assert sizes <= kept * sum(each.parameters_dense for each in result.layers)
