"""What it takes to capture the layers of a network, against a plain pass and the eigenvectors."""

import time

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

import ddlr
from ddlr.captured import LayerInputs
from experiments.real.runs import peak_memory


def capture_rows(cfg: DictConfig) -> list[dict]:
    """Capture all layers of a network; the row of `results/real_capture.csv`.

    network, samples, rows
        `rows` of inputs a layer has, in the one that has most: tokens, for a network of text.
    seconds_forward
        Of one pass over the calibration samples without anything else.
    seconds_eigen
        Of the eigenvectors of all layers, each set of inputs once; they are the part of the capture
        that needs no network.
    seconds_capture, ratio
        Of the capture, eigenvectors included, and as a multiple of the sum of the two above.
    activation_bytes, peak_memory_bytes
        What is captured, and the resident memory of the process at its peak after the capture.
    """
    torch.set_num_threads(cfg.threads)
    network = instantiate(cfg.network)
    started = time.perf_counter()
    network.outputs(network.model, network.data.calibration)
    forward = time.perf_counter() - started
    started = time.perf_counter()
    captured = ddlr.capture_layers(
        network.model, network.data.calibration, layers=network.layers, forward=network.forward
    )
    seconds, peak = time.perf_counter() - started, peak_memory()
    # Layers that are given the same inputs share them, and their eigenvectors.
    inputs = {id(layer.inputs): layer.inputs for layer in captured.layers}
    held = {id(each): each for layer in captured.layers for each in (layer.inputs, layer.targets)}
    started = time.perf_counter()
    for each in inputs.values():
        _ = LayerInputs(each).centred.eigen
    eigen = time.perf_counter() - started
    row = {
        "network": cfg.network_name,
        "samples": cfg.network.calibration_samples,
        "rows": max(len(each) for each in inputs.values()),
        "layers": len(captured.layers),
        "seconds_forward": forward,
        "seconds_eigen": eigen,
        "seconds_capture": seconds,
        "ratio": seconds / (forward + eigen),
        "activation_bytes": sum(each.numel() * each.element_size() for each in held.values()),
        "peak_memory_bytes": peak,
    }
    return [row]
