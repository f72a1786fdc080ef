"""Forms of a network are compared with it before they are timed, in every engine and batch."""

import pytest
import torch
from torch import nn

import ddlr
from ddlr.layers import LowRankLinear
from experiments.benchmarks import deployed
from experiments.benchmarks.deployed import Deployed, of_samples, stored_file, times

QUICK = {"rounds": 2, "seconds": 1e-5}
EXAMPLE = torch.rand(8, 12, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    first = LowRankLinear.from_weight(torch.randn(9, 12), torch.randn(9), rank=2)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(9, 4)).eval()


def forms(model: nn.Module) -> list[Deployed]:
    modules = {"plain": model, "compact": ddlr.compact(model), "fused": ddlr.fuse_chains(model)}
    return [Deployed(name, module, model) for name, module in modules.items()]


def test_a_row_for_each_engine_number_of_threads_batch_and_form():
    before = torch.get_num_threads()
    engines, batches, threads = ["torch", "onnxruntime"], [1, 20], [1, 2]
    rows = list(
        times(forms(network()), EXAMPLE, batches=batches, threads=threads, engines=engines, **QUICK)
    )
    wanted = [
        (engine, count, batch, name)
        for engine in engines
        for count in threads
        for batch in batches
        for name in ("plain", "compact", "fused")
    ]
    keys = ("engine", "threads", "batch", "name")
    assert [tuple(row[key] for key in keys) for row in rows] == wanted
    assert all(row["microseconds"] > 0 for row in rows)
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_compiled_forms_are_timed_too():
    rows = times(
        forms(network())[2:], EXAMPLE, batches=[3], threads=[1], engines=["compiled"], **QUICK
    )
    assert [row["engine"] for row in rows] == ["compiled"]


class OffFrom(nn.Module):
    """A network whose outputs are off, by a little of the largest, at batches of one size."""

    def __init__(self, model: nn.Module, size: int, share: float):
        super().__init__()
        self.model, self.size, self.share = model, size, share

    def forward(self, inputs):
        outputs = self.model(inputs)
        if len(inputs) != self.size:
            return outputs
        return outputs + self.share * outputs.abs().max()


def test_a_form_that_computes_something_else_is_not_timed():
    model = network()
    arguments = {"batches": [1, 7], "threads": [1], "engines": ["torch"], **QUICK}
    for size in (1, 7):
        wrong = [Deployed("wrong", OffFrom(model, size, 1e-3), model)]
        with pytest.raises(RuntimeError, match=rf"wrong, torch, batch {size}: outputs differ by"):
            list(times(wrong, EXAMPLE, **arguments))
    nearly = [Deployed("near", OffFrom(model, 7, 1e-6), model)]
    assert len(list(times(nearly, EXAMPLE, **arguments))) == 2
    cut = [Deployed("cut", nn.Sequential(model, nn.Flatten(0)), model)]
    with pytest.raises(RuntimeError, match=r"cut, torch, batch 1"):
        list(times(cut, EXAMPLE, **arguments))


def test_outputs_that_are_not_numbers_are_not_equal():
    model = network()
    wrong = nn.Sequential(model, nn.Threshold(1e9, float("nan")))
    with pytest.raises(RuntimeError, match="differ by nan"):
        deployed.check_outputs(lambda: wrong(EXAMPLE), model, EXAMPLE, "wrong")


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = network()

    def forward(self, first, second):
        return self.layer(first - second)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_inputs_may_be_several_or_have_names(engine):
    model = TwoInputs().eval()
    examples = (EXAMPLE, 2 * EXAMPLE), {"second": 2 * EXAMPLE, "first": EXAMPLE}
    for example in examples:
        rows = times(
            [Deployed("two", model, model)],
            example,
            batches=[5],
            threads=[1],
            engines=[engine],
            **QUICK,
        )
        assert len(list(rows)) == 1
        sides = of_samples(example, 3)
        sides = sides.values() if isinstance(sides, dict) else sides
        assert {len(side) for side in sides} == {3}


def test_an_engine_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="engines has 'tensorrt'; choose among"):
        list(
            times(
                forms(network()), EXAMPLE, batches=[1], threads=[1], engines=["tensorrt"], **QUICK
            )
        )


def test_a_network_comes_out_of_its_file():
    model = network()
    loaded, about = stored_file(model, repetitions=2)
    torch.testing.assert_close(loaded(EXAMPLE), model(EXAMPLE), rtol=1e-5, atol=1e-6)
    assert not loaded.training
    weights = 4 * sum(parameter.numel() for parameter in loaded.parameters())
    assert weights < about["file_bytes"] < weights + 8000
    assert about["load_milliseconds"] > 0
