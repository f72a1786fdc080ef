"""Batches of any form are passed to the network as it takes them, and padding is left out."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import ddlr
import nettrim
from ddlr.calls import Batch, as_batches

torch.manual_seed(0)
TOKENS = torch.randint(1, 20, (60, 7))
LENGTHS = torch.randint(2, 8, (60,))
MASK = torch.arange(7) < LENGTHS[:, None]
INPUTS = torch.randn(200, 12)


class Encoder(nn.Module):
    """Embeds tokens, mixes two layers over them, and gives an object with fields."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(20, 12)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, tokens, attention_mask=None, scale=1.0):
        hidden = self.table(tokens) * scale
        hidden = self.second(self.first(hidden).relu())
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        return SimpleNamespace(states=hidden, pooled=hidden.mean(dim=1))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.left, self.right, self.out = nn.Linear(12, 10), nn.Linear(5, 10), nn.Linear(10, 4)

    def forward(self, left, right):
        return self.out((self.left(left) + self.right(right)).relu())


def weights(result) -> list[Tensor]:
    return [result.model.get_submodule(report.name).weight for report in result.layers]


def compress(model, calibration, **options):
    options = {"method": "lowest_rank", "relative_tolerance": 0.2, **options}
    return ddlr.compress(model, calibration, **options)


def same(one, other) -> bool:
    return all(torch.equal(*pair) for pair in zip(weights(one), weights(other), strict=True))


def test_all_forms_of_one_call_give_the_same():
    model, right = TwoInputs(), torch.randn(200, 5)
    Pair = namedtuple("Pair", ["left", "right"])
    halves = list(zip(INPUTS.split(100), right.split(100), strict=True))
    expected = compress(model, halves)
    forms = {
        "lists, as a loader gives them": [list(pair) for pair in halves],
        "named tuples": [Pair(*pair) for pair in halves],
        "keyword inputs": [{"left": one, "right": other} for one, other in halves],
        "a generator that yields once": (pair for pair in halves),
        "a loader": torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(INPUTS, right), batch_size=100
        ),
    }
    for form, calibration in forms.items():
        assert same(compress(model, calibration), expected), form
    objects = [SimpleNamespace(pair=pair, note="kept") for pair in halves]
    calls = {"forward": lambda model, batch: model(*batch.pair)}
    assert same(compress(model, objects, **calls), expected)
    nested = [{"inputs": {"left": one, "right": [other]}} for one, other in halves]

    def forward(model, batch):
        return model(batch["inputs"]["left"], batch["inputs"]["right"][0])

    assert same(compress(model, nested, forward=forward), expected)
    # One dict is one batch; of another size, so that products may be rounded otherwise.
    whole = compress(model, {"left": INPUTS, "right": right})
    for one, other in zip(weights(whole), weights(expected), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_inputs_are_left_as_they_are_and_each_pass_gets_a_copy():
    class Overwrites(TwoInputs):
        def forward(self, left, right):
            return super().forward(left.mul_(1.0).add_(0.0), right.zero_())

    batch = {"left": INPUTS.clone(), "right": torch.randn(200, 5)}
    before = {name: each.clone() for name, each in batch.items()}
    compress(Overwrites(), [batch])
    assert all(torch.equal(batch[name], before[name]) for name in batch)


@pytest.mark.parametrize("door", [ddlr.compress, nettrim.prune])
def test_a_goal_is_measured_on_what_forward_says_is_the_output(door):
    model = Encoder()
    batches = [{"tokens": TOKENS[:30]}, {"tokens": TOKENS[30:]}]
    options = {"max_output_error": 0.6, "tolerances": [0.2, 0.4, 0.6]}
    with pytest.raises(ValueError, match=r"output is a SimpleNamespace.*forward=lambda"):
        door(model, batches, **options)
    result = door(model, batches, forward=lambda model, batch: model(**batch).pooled, **options)
    with torch.no_grad():
        wanted, got = (each(TOKENS).pooled for each in (model, result.model))
    error = ((got - wanted).norm() / wanted.norm()).item()
    assert result.goal.measured == pytest.approx(error, rel=1e-4)
    assert 0 < error <= 0.6


def test_a_network_is_refitted_as_it_is_called():
    model = Encoder()
    forward = {"forward": lambda model, batch: model(**batch).pooled}
    batches = [{"tokens": TOKENS[:30]}, {"tokens": TOKENS[30:]}]
    plain = compress(model, batches, relative_tolerance=0.4, **forward)
    moved = compress(
        model, batches, relative_tolerance=0.4, refit="network", output="values", **forward
    )
    with torch.no_grad():
        wanted = model(TOKENS).pooled
        errors = [(each.model(TOKENS).pooled - wanted).norm() for each in (plain, moved)]
    assert errors[1] < errors[0]


# --- what counts -----------------------------------------------------------------------------


def rows_of(model, calibration, **options):
    captured = ddlr.capture_layers(model, calibration, **options)
    return {layer.name: layer for layer in captured.layers}


def test_padding_is_left_out_by_the_usual_name_and_by_a_function():
    model = Encoder()
    padded = [{"tokens": TOKENS, "attention_mask": MASK.long()}]
    by_name = rows_of(model, padded)
    with torch.no_grad():
        hidden = model.table(TOKENS)[MASK]
    assert torch.equal(by_name["first"].inputs, hidden)
    assert len(by_name["second"].targets) == int(MASK.sum())
    by_function = rows_of(model, TOKENS, samples=lambda tokens: MASK)
    assert torch.equal(by_function["first"].inputs, hidden)
    everything = rows_of(model, padded, samples=lambda batch: None)
    assert len(everything["first"].inputs) == TOKENS.numel()
    # What is at the padding does not matter, then: the whole compression is that of other padding.
    others = torch.where(MASK, TOKENS, 3)
    one, other = (
        compress(model, [{"tokens": each, "attention_mask": MASK.long()}])
        for each in (TOKENS, others)
    )
    assert same(one, other)
    assert not same(compress(model, TOKENS), compress(model, others))


def test_masks_hold_in_cascade_order_and_for_a_capture_used_again():
    model = Encoder()
    padded = [{"tokens": TOKENS, "attention_mask": MASK.long()}]
    captured = ddlr.capture_layers(model, padded)
    for order in ("parallel", "cascade"):
        results = [compress(model, each, order=order) for each in (padded, captured)]
        assert same(*results)
        report = results[0].layers[1]
        with torch.no_grad():
            before = model if order == "parallel" else results[0].model
            given = before.first(model.table(TOKENS)[MASK]).relu()
            wanted = model.second(model.first(model.table(TOKENS)[MASK]).relu())
            error = (results[0].model.second(given) - wanted).norm() / wanted.norm()
        assert report.relative_error == pytest.approx(error.item(), rel=1e-3)


def test_a_mask_that_is_no_mask_is_refused():
    model = Encoder()
    with pytest.raises(TypeError, match=r"samples gives a torch.int64"):
        compress(model, TOKENS, samples=lambda tokens: MASK.long())
    with pytest.raises(ValueError, match="no position that counts"):
        compress(model, TOKENS, samples=lambda tokens: torch.zeros_like(MASK))


def test_the_rows_that_are_kept_are_bounded_and_the_same_in_each_pass():
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    captured = ddlr.capture_layers(model, INPUTS.split(50), max_samples=100)
    assert [len(layer.inputs) for layer in captured.layers] == [100, 100]
    first, second = captured.layers
    assert torch.equal(first.targets, second.inputs)  # of the same samples
    compress(model, captured)
    compress(model, captured, order="cascade")
    batch = Batch(INPUTS, most_rows=30)
    assert torch.equal(batch.chosen_rows((200,)), batch.chosen_rows((200,)))
    assert len(set(batch.chosen_rows((200,)).tolist())) == 30


# --- what is refused -------------------------------------------------------------------------


def test_batches_whose_call_is_not_plain_are_refused():
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    labelled = [(INPUTS, torch.zeros(200))]
    with pytest.raises(TypeError, match=r"tuple of 2 tensors.*take the labels off.*forward="):
        compress(model, labelled)
    # Labels that an optional argument would swallow.
    with pytest.raises(TypeError, match="takes 1 positional"):
        compress(Encoder(), [(TOKENS, MASK)])
    plain = compress(model, INPUTS)
    taken = compress(model, labelled, forward=lambda model, batch: model(batch[0]))
    assert same(plain, taken)
    with pytest.raises(TypeError, match="a calibration batch is a str"):
        compress(model, ["a", "b"])
    with pytest.raises(TypeError, match="list with a int in it"):
        compress(model, [[1, 2]])
    with pytest.raises(TypeError, match="calibration is a ndarray"):
        compress(model, INPUTS.numpy())
    with pytest.raises(TypeError, match="calibration is a int"):
        compress(model, 3)
    captured = ddlr.capture_layers(model, INPUTS)
    with pytest.raises(ValueError, match="forward was settled by capture_layers"):
        compress(model, captured, forward=lambda model, batch: model(batch))


def test_a_part_of_a_batch_has_a_part_of_each_of_its_tensors():
    batch = Batch({"tokens": TOKENS, "mask": MASK, "scale": torch.tensor(2.0)})
    part = batch.part(slice(0, 4))
    assert len(batch) == 60 and len(part) == 4
    assert torch.equal(part.values["mask"], MASK[:4]) and part.values["scale"] == 2
    assert as_batches([batch])[0] is batch
