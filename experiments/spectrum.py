"""What each method does to the singular values of one layer: ``python -m experiments.spectrum``.

Writes `results/spectrum.csv`, one row a singular value: of the original weight, and of the weight
that each method of `conf/spectrum.yaml` makes of it. In the plain metric they are those of W, in
the input metric those of W G^(1/2) / sqrt(samples), G the Gram matrix of the centred inputs: the
standard deviations of the pre-activations along their principal directions.
"""

import logging
from pathlib import Path

import hydra
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from ddlr.captured import CapturedLayer, CapturedLayers
from ddlr.layers import numerical_rank
from experiments.configuration import CONFIG_PATH
from experiments.methods.configured import compress_as_configured
from experiments.runs.preparation import prepare
from experiments.runs.records import write_whole
from experiments.runs.solves import DiskSolveCache
from experiments.training import choose_device

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="spectrum")
def main(cfg: DictConfig) -> None:
    path = Path(cfg.results_dir) / "spectrum.csv"
    table = spectra(cfg)
    write_whole(path, lambda scratch: table.to_csv(scratch, index=False, float_format="%.6g"))
    log.info("%s: %d rows", path, len(table))


def spectra(cfg: DictConfig) -> pd.DataFrame:
    """Singular values of the layer `cfg.layer`, before and after each method of `cfg.methods`.

    Columns model, layer, method ("original" for the weight as trained), refit, relative_tolerance,
    metric ("plain" or "input"), index (from 1, the largest) and value. A weight has as many as its
    rank; inputs and outputs that are always zero are left out of it.

    Raises
    ------
    ValueError
        If the network has no such layer; names those it has.
    """
    prepared = prepare(cfg, choose_device(cfg.device))
    layer = _named(prepared.captured, cfg.layer)
    about = {"model": cfg.model.name, "layer": cfg.layer}
    original = {"method": "original", "refit": "none", "relative_tolerance": None}
    tables = [_values(layer, layer.weight, {**about, **original})]
    # In parallel order a layer is compressed on its own.
    alone = prepared.captured.only([layer.name])
    # Refits of one method share a solve.
    cache = DiskSolveCache(Path(cfg.cache_dir), cfg.cache.limit_gib) if cfg.cache.enabled else None
    for method in cfg.methods.values():
        compressed = compress_as_configured(method, prepared.network, alone, solve_cache=cache)
        weight = compressed.model.get_submodule(layer.name).weight.detach()
        choice = {
            "method": method.name,
            "refit": method.get("refit", "none"),
            "relative_tolerance": method.relative_tolerance,
        }
        log.info("%s, refit %s: rank %d", *list(choice.values())[:2], compressed.layers[0].rank)
        tables.append(_values(layer, weight, {**about, **choice}))
    return pd.concat(tables, ignore_index=True)


def _named(captured: CapturedLayers, name: str) -> CapturedLayer:
    known = {layer.name: layer for layer in captured.layers}
    if name not in known:
        raise ValueError(f"layer is {name!r}; the network has {list(known)}")
    return known[name]


@torch.no_grad()
def _values(layer: CapturedLayer, weight: Tensor, about: dict) -> pd.DataFrame:
    """The singular values of one weight in both metrics."""
    weight = weight[layer.live_out][:, layer.live_in].double()
    variances, vectors = layer.live_inputs.eigen
    scales = (variances.double() / len(layer.inputs)).sqrt()
    matrices = {"plain": weight, "input": (weight @ vectors.double()) * scales}
    # Of a low-rank weight the values beyond its rank are rounding.
    rank = numerical_rank(weight.to(layer.weight))
    tables = []
    for metric, matrix in matrices.items():
        values = torch.linalg.svdvals(matrix)[:rank].tolist()
        index = range(1, len(values) + 1)
        tables.append(pd.DataFrame({**about, "metric": metric, "index": index, "value": values}))
    return pd.concat(tables)


if __name__ == "__main__":
    main()
