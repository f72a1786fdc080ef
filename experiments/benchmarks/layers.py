"""The layer problems that solvers are timed on: made-up ones, and layers of trained networks."""

from dataclasses import dataclass

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from ddlr import WarmStart, capture_layers
from ddlr.constraints import OutputSet
from experiments.runs.preparation import load_network


@dataclass(frozen=True)
class Layer:
    """A layer problem to be timed, and the weight to start at."""

    inputs: Tensor
    targets: Tensor
    activation: str
    start: WarmStart | None = None

    def radius(self, relative_tolerance: float) -> float:
        return relative_tolerance * torch.linalg.vector_norm(self.targets).item()

    @property
    def shape(self) -> dict:
        return {
            "in_features": self.inputs.shape[1],
            "out_features": self.targets.shape[1],
            "samples": len(self.inputs),
        }


def made_up_layer(
    in_features: int,
    out_features: int,
    samples: int,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Layer:
    """A layer with ReLU whose inputs and weight have spectra that decay like 1 / (1 + k / 10)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    def decay(count: int) -> Tensor:
        return 1 / (1 + torch.arange(count, device=device, dtype=dtype) / 10)

    inputs = (normal(samples, in_features) * decay(in_features)) @ normal(in_features, in_features)
    inputs.div_(inputs.square().mean().sqrt())
    inner = min(in_features, out_features)
    weight = (normal(out_features, inner) * decay(inner)) @ normal(inner, in_features)
    targets = torch.mm(inputs, weight.T)
    scale = targets.square().mean().sqrt()
    bias = 0.1 * normal(out_features)
    targets = targets.div_(scale).add_(bias).relu_()
    return Layer(inputs, targets, "relu", WarmStart(weight.div_(scale), bias))


def trained_layer(cfg: DictConfig, device: torch.device, samples: int) -> Layer:
    """A layer of a trained network on its calibration samples, dead inputs and outputs left out."""
    network, _ = load_network(cfg, device)
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    calibration = instantiate(cfg.dataset).calibration(samples, cfg.seed)
    (layer,) = capture_layers(network, calibration, layers=[names[cfg.layer.position]]).layers
    live_in, live_out = layer.live_in, layer.live_out
    start = WarmStart(layer.weight[live_out][:, live_in], layer.bias[live_out])
    return Layer(layer.live_inputs.inputs, layer.targets[:, live_out], layer.activation, start)


def relative_error(layer: Layer, weight: Tensor, bias: Tensor) -> float:
    """||D||_F of a weight's outputs, in the sense of the hinge set, relative to the targets'."""
    outputs = OutputSet(layer.targets, 0.0, layer.activation, "hinge")
    return outputs.violation(torch.addmm(bias, layer.inputs, weight.T))


def data_bytes(layer: Layer) -> int:
    return layer.inputs.nbytes + layer.targets.nbytes
