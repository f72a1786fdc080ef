"""How fast a sparse layer in CSR is beside the dense one, by the share of weights that it keeps."""

import logging

import torch
from omegaconf import DictConfig
from torch import nn

from ddlr.latency import fastest_times
from ddlr.layers import SparseLinear

log = logging.getLogger(__name__)


def sparse_layers(cfg: DictConfig, device: torch.device) -> list[dict]:
    """Made-up layers, with nonzeros anywhere: rows of seconds and of seconds_dense of one batch.

    Both are timed in turn in the same rounds, and the smallest time counts.
    """
    settings = cfg.sparse
    generator = torch.Generator().manual_seed(cfg.seed)
    rows = []
    for in_features, out_features in settings.layers:
        dense = nn.Linear(in_features, out_features).to(device)
        for kept in settings.kept_fractions:
            chosen = torch.rand(dense.weight.shape, generator=generator).to(device) < kept
            weight, bias = dense.weight.detach() * chosen, dense.bias.detach()
            sparse = SparseLinear.from_weight(weight, bias)
            for batch in settings.batches:
                inputs = torch.randn(batch, in_features, generator=generator).to(device)
                seconds_dense, seconds = fastest_times(
                    (dense, sparse), inputs, rounds=settings.rounds
                )
                rows.append(
                    {
                        "case": "sparse",
                        "solver": "CSR",
                        "in_features": in_features,
                        "out_features": out_features,
                        "samples": batch,
                        "kept_fraction": kept,
                        "seconds": seconds,
                        "seconds_dense": seconds_dense,
                    }
                )
        log.info("%d x %d: timed", in_features, out_features)
    return rows
