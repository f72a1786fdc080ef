"""All methods as functions of a network, with settings as plain keyword arguments."""

from dataclasses import fields
from functools import partial

import torch
from torch import Tensor, nn

import ddlr
import nettrim
from ddlr import CompressionResult, Goal, Settings
from ddlr.calls import as_batches
from ddlr.outputs import outputs_by_batch
from experiments.methods.closed_forms import (
    ACTIVATION_SVD,
    ACTIVATION_SVD_SELECTED,
    MAGNITUDE,
    MAGNITUDE_GLOBAL,
    SVD,
)


def _split(arguments: dict) -> dict:
    """Arguments of `compress_network`, with those of a `Goal` and of `Settings` gathered."""
    kinds = {"goal": Goal, "settings": Settings}
    own = {
        kind: {name: arguments.pop(name) for name in names if name in arguments}
        for kind, names in {
            kind: [each.name for each in fields(made)] for kind, made in kinds.items()
        }.items()
    }
    return arguments | {kind: kinds[kind](**values) for kind, values in own.items() if values}


def _with_settings(arguments: dict) -> dict:
    own = {each.name for each in fields(Settings)} & set(arguments)
    settings = {name: arguments.pop(name) for name in own}
    return arguments | ({"settings": Settings(**settings)} if settings else {})


def compress(model, calibration, **arguments) -> CompressionResult:
    return ddlr.compress(model, calibration, **_with_settings(arguments))


def prune(model, calibration, **arguments) -> CompressionResult:
    return nettrim.prune(model, calibration, **_with_settings(arguments))


def _by(method, model, calibration, **arguments) -> CompressionResult:
    return ddlr.compress_network(model, calibration, method, **_split(arguments))


def outputs_of(model: nn.Module, batches) -> Tensor:
    """What a network gives for all batches, leading dimensions flattened, (rows, outputs)."""
    return torch.cat([each.flatten(0, -2) for each in outputs_by_batch(model, as_batches(batches))])


svd = partial(_by, SVD)
activation_svd = partial(_by, ACTIVATION_SVD)
activation_svd_selected = partial(_by, ACTIVATION_SVD_SELECTED)
magnitude = partial(_by, MAGNITUDE)
magnitude_global = partial(_by, MAGNITUDE_GLOBAL)
