"""How long networks take in the forms and engines in which they are deployed.

Networks that are compared with each other are timed in turn, in the same rounds, so that all see
the same state of the machine. Each is first compared with the network whose outputs it has to have.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import ddlr
from ddlr.latency import fastest_times, rows_of

# What a network that comes out of a file is timed as.
FORMS = {"stored": lambda network: network, "fused": ddlr.fuse_chains}

# Of outputs, relative to the largest.
LARGEST_DIFFERENCE = 1e-4

# What a network is called with: one tensor, positional arguments, or keyword arguments.
Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
# Of inputs, to a call that computes the outputs of these, again and again.
Bound = Callable[[Inputs], Callable[[], Any]]


@dataclass(frozen=True)
class Deployed:
    """A network in one form.

    Attributes
    ----------
    name : str
    module : nn.Module
    reference : nn.Module
        The network whose outputs it has to have, up to `LARGEST_DIFFERENCE`.
    """

    name: str
    module: nn.Module
    reference: nn.Module


def times(
    networks: Sequence[Deployed],
    example: Inputs,
    *,
    batches: Sequence[int],
    threads: Sequence[int],
    engines: Sequence[str],
    rounds: int,
    seconds: float,
) -> Iterator[dict]:
    """Time some networks side by side.

    Rows of name, engine, threads, batch and microseconds: the smallest time of a batch.

    Parameters
    ----------
    example : Tensor, sequence or mapping of Tensor
        Inputs, samples first in all tensors; batches are made of them, see `ddlr.latency.rows_of`.
    batches, threads : sequence of int
        Numbers of samples, and of threads.
    engines : sequence of str
        Of `ENGINES`.
    rounds, seconds : int, float
        Timings of each network in each combination, and how long each lasts at least.

    Raises
    ------
    ValueError
        If there is no such engine; names it.
    RuntimeError
        If the outputs of a form are off; names the form, the engine and the batch.
    """
    for engine in engines:
        if engine not in ENGINES:
            raise ValueError(f"engines has {engine!r}; choose among {tuple(ENGINES)}")
    before = torch.get_num_threads()
    try:
        for engine in engines:
            for count in threads:
                torch.set_num_threads(count)
                bound = [ENGINES[engine](each.module, example, count) for each in networks]
                for batch in batches:
                    inputs = of_samples(example, batch)
                    calls = [bind(inputs) for bind in bound]
                    for network, call in zip(networks, calls, strict=True):
                        what = f"{network.name}, {engine}, batch {batch}"
                        check_outputs(call, network.reference, inputs, what)
                    ignoring = [_ignoring(call) for call in calls]
                    took = fastest_times(ignoring, None, rounds=rounds, seconds=seconds)
                    for network, each in zip(networks, took, strict=True):
                        yield {
                            "name": network.name,
                            "engine": engine,
                            "threads": count,
                            "batch": batch,
                            "microseconds": 1e6 * each,
                        }
    finally:
        torch.set_num_threads(before)


def of_samples(example: Inputs, number: int) -> Inputs:
    """The example with another number of samples."""
    if isinstance(example, Tensor):
        return rows_of(example, number)
    if isinstance(example, Mapping):
        return {name: rows_of(tensor, number) for name, tensor in example.items()}
    return tuple(rows_of(tensor, number) for tensor in example)


def check_outputs(call: Callable[[], Any], reference: nn.Module, inputs: Inputs, what: str) -> None:
    """Raise a RuntimeError where a call does not give the outputs of a network; names what."""
    with torch.inference_mode():
        wanted = _first(_call(reference.eval(), inputs)).double()
        given = torch.as_tensor(_first(call())).double()
    largest = wanted.abs().max().item()
    difference = (given - wanted).abs().max().item() / (largest or 1.0)
    if given.shape != wanted.shape or not difference <= LARGEST_DIFFERENCE:
        raise RuntimeError(
            f"{what}: outputs differ by {difference:.1e} of the largest from those of the "
            f"compressed network; {LARGEST_DIFFERENCE:g} is allowed"
        )


def speedups(measured: pd.DataFrame, about: Mapping[str, dict]) -> Iterator[dict]:
    """The times of each method's forms beside those of the dense network.

    Rows of what is known of the method, form, engine, threads, batch, microseconds,
    microseconds_dense and speedup.

    Parameters
    ----------
    measured : DataFrame
        Rows of `times`, of networks named "dense" and "<method> <form>" for each of `FORMS`.
    about : mapping
        What is known of each method.
    """
    where = ["engine", "threads", "batch"]
    dense = measured[measured["name"] == "dense"].set_index(where)["microseconds"]
    for method, facts in about.items():
        for form in FORMS:
            for row in measured[measured["name"] == f"{method} {form}"].to_dict("records"):
                place = {key: row[key] for key in where}
                before = dense[tuple(place.values())]
                yield {
                    **facts,
                    "form": form,
                    **place,
                    "microseconds": row["microseconds"],
                    "microseconds_dense": before,
                    "speedup": before / row["microseconds"],
                }


def stored_file(
    network: nn.Module, like: nn.Module | None = None, repetitions: int = 5
) -> tuple[nn.Module, dict]:
    """A network as it comes out of a file, and what the file costs.

    Returns the network that `ddlr.load` gives, and a row of file_bytes and load_milliseconds: the
    smallest time of some loads, of a file that the system has in memory.

    Parameters
    ----------
    like : nn.Module, optional
        The original network, where it has parts that a file does not tell how to make.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        ddlr.save(network, path)
        seconds = []
        for _ in range(repetitions):
            started = time.perf_counter()
            loaded = ddlr.load(path, like)
            seconds.append(time.perf_counter() - started)
        return loaded, {
            "file_bytes": path.stat().st_size,
            "load_milliseconds": 1e3 * min(seconds),
        }


# --- engines ---------------------------------------------------------------------------------


def _in_torch(module: nn.Module, example: Inputs, threads: int) -> Bound:
    """As it is."""
    module = module.eval()
    return lambda inputs: partial(_call, module, inputs)


def _compiled(module: nn.Module, example: Inputs, threads: int) -> Bound:
    """By `torch.compile`, for each batch size anew, as its compiler likes it."""
    module = module.eval()

    def bind(inputs: Inputs) -> Callable[[], Any]:
        torch._dynamo.reset()  # a compiled module would soon be at its limit of recompilations
        compiled = torch.compile(module, dynamic=False)
        with torch.inference_mode():
            _call(compiled, inputs)
        return partial(_call, compiled, inputs)

    return bind


def _in_onnxruntime(module: nn.Module, example: Inputs, threads: int) -> Bound:
    """By ONNX Runtime, from the file that `ddlr.to_onnx` writes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        # Outputs are compared before they are timed.
        ddlr.to_onnx(module, of_samples(example, 2), path, check=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def bind(inputs: Inputs) -> Callable[[], Any]:
        if isinstance(inputs, Mapping):
            fed = {name: inputs[name].numpy() for name in names}
        else:
            tensors = (inputs,) if isinstance(inputs, Tensor) else inputs
            fed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return partial(session.run, None, fed)

    return bind


ENGINES: dict[str, Callable[[nn.Module, Inputs, int], Bound]] = {
    "torch": _in_torch,
    "compiled": _compiled,
    "onnxruntime": _in_onnxruntime,
}


def _call(module: nn.Module, inputs: Inputs) -> Any:
    if isinstance(inputs, Tensor):
        return module(inputs)
    return module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)


def _first(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, tuple | list) else outputs


def _ignoring(call: Callable[[], Any]) -> Callable[[object], Any]:
    return lambda _: call()
