"""Time the fully connected heads of compressed networks: ``python -m experiments.inference``.

Writes `results/inference.csv`. The networks are those of `experiments.compress`, from the same
functions, and begin at the first fully connected layer. Each layer is timed in the form in which it
is stored: dense, as two factors, or as CSR. The dense head is timed anew beside each compressed
one, so that both see the same state of the machine.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import hydra
import pandas as pd
import torch
from hydra import compose
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.benchmark import Measurement, Timer

from ddlr import CompressionResult, LowRankLinear
from ddlr.layers import store_linear
from ddlr.sizes import BYTES_PER_VALUE, csr_bytes, layer_size
from experiments.configuration import CONFIG_PATH
from experiments.methods.configured import compress_as_configured
from experiments.metrics import size_measures
from experiments.runs.preparation import Prepared, prepare
from experiments.runs.records import write_whole
from experiments.runs.solves import DiskSolveCache
from experiments.runs.units import describe

log = logging.getLogger(__name__)

# Of the outputs of one head in two forms, in float32.
_LARGEST_DIFFERENCE = 1e-4
_PATHS = ("data_dir", "checkpoint_dir", "cache_dir")


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="inference")
def main(cfg: DictConfig) -> None:
    path = Path(cfg.results_dir) / "inference.csv"
    table = pd.DataFrame(row for run in runs(cfg) for row in timed(run, cfg))
    write_whole(path, lambda scratch: table.to_csv(scratch, index=False, float_format="%.6g"))
    log.info("%s:\n%s", path, table.to_string(index=False))


def runs(cfg: DictConfig) -> list[DictConfig]:
    """The runs of `experiments.compress` whose networks are timed, each as its own config."""
    paths = {key: cfg[key] for key in _PATHS}
    composed = []
    for network, method, tolerance in product(cfg.heads, cfg.methods, cfg.relative_tolerances):
        choices = {
            "dataset": network.dataset,
            "model": network.model,
            "method": method,
            "method.refit": cfg.refit,
            "method.relative_tolerance": tolerance,
            "seed": cfg.seed,
            "calibration_samples": cfg.calibration_samples,
        }
        run = compose("compress", overrides=[f"{key}={value}" for key, value in choices.items()])
        composed.append(OmegaConf.merge(run, paths))
    return composed


def timed(run: DictConfig, cfg: DictConfig) -> Iterator[dict]:
    """Compress a network as a run says, and time its head at each of `cfg.batches`.

    Rows of model, method, form (of each layer in turn, "+" between them), relative_tolerance,
    kept_fraction, batch, microseconds (median of a pass through the head), microseconds_dense (of
    the original's, in the same run), speedup and repetitions.

    Raises
    ------
    ValueError
        If a batch is larger than the calibration set, whose activations are the head's inputs.
    RuntimeError
        If the timed form does not compute what the compressed network does; names the run.
    """
    prepared = prepare(run, torch.device("cpu"))
    inputs = prepared.captured.layers[0].inputs
    if max(cfg.batches) > len(inputs):
        raise ValueError(
            f"batches has {max(cfg.batches)}, but calibration_samples is {len(inputs)}; the "
            "batches are taken from those, so they must not be larger"
        )
    # Solved in the sweeps already, as a rule.
    cache = DiskSolveCache(Path(run.cache_dir), run.cache.limit_gib) if run.cache.enabled else None
    compressed = compress_as_configured(
        run.method, prepared.network, prepared.captured, solve_cache=cache
    )
    fast, dense = head(compressed.model, in_stored_form), head(prepared.network, as_linear)
    with torch.inference_mode():
        _check(fast, head(compressed.model, as_linear), inputs, describe(run))
    about = _about(run, prepared, compressed)
    for batch in cfg.batches:
        before, after = (_measure(each, inputs[:batch], cfg) for each in (dense, fast))
        yield {
            **about,
            "batch": batch,
            "microseconds": 1e6 * after.median,
            "microseconds_dense": 1e6 * before.median,
            "speedup": before.median / after.median,
            "repetitions": after.number_per_run * len(after.times),
        }
    log.info("%s: timed", describe(run))


def head(network: nn.Sequential, form: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    """A network with its linear and low-rank layers put into a form by `form`.

    Without dropout, which at inference does nothing.
    """
    return nn.Sequential(
        *(
            form(layer) if isinstance(layer, nn.Linear | LowRankLinear) else layer
            for layer in network
            if not isinstance(layer, nn.Dropout)
        )
    ).eval()


def in_stored_form(layer: nn.Module) -> nn.Module:
    """A compressed layer as it runs: a sparse one in CSR, where that is smaller than an array."""
    return CSRLinear(layer) if _form(layer) == "csr" else layer


def as_linear(layer: nn.Module) -> nn.Linear:
    """A compressed layer as one `nn.Linear`, whatever its form."""
    return store_linear(layer.weight.detach(), layer.bias.detach())


def _form(layer: nn.Module) -> str:
    if isinstance(layer, LowRankLinear):
        return "low_rank"
    stored = layer.weight != 0
    nonzeros, rows, columns = (
        int(each.sum()) for each in (stored, stored.any(dim=1), stored.any(dim=0))
    )
    smaller = csr_bytes(nonzeros, rows, columns) < BYTES_PER_VALUE * rows * columns
    return "csr" if smaller and layer_size(layer).form == "sparse" else "dense"


class CSRLinear(nn.Module):
    """A linear layer whose weight is a sparse matrix in CSR.

    Its product is with the batch as columns, or as one vector: several times as fast as the one
    that `nn.functional.linear` takes. Indices are of 32 bits, which the sparse kernels of MKL work
    on without converting them.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
            csr = weight.to_sparse_csr()
            indices = csr.crow_indices().int(), csr.col_indices().int()
            self.weight = torch.sparse_csr_tensor(
                *indices, csr.values(), weight.shape, check_invariants=True
            )
        self.bias = layer.bias.detach()

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) == 1:
            return (self.weight @ inputs[0] + self.bias)[None]
        return (self.weight @ inputs.T + self.bias[:, None]).T


def _check(fast: nn.Module, reference: nn.Module, inputs: Tensor, name: str) -> None:
    # The first alone as well, since a batch of one may take another way.
    for batch in (inputs[:1], inputs):
        wanted = reference(batch)
        difference = (torch.linalg.vector_norm(fast(batch) - wanted) / wanted.norm()).item()
        if not difference <= _LARGEST_DIFFERENCE:
            raise RuntimeError(
                f"{name}: the outputs of the timed form differ by {difference:.1e} of their norm "
                f"from those of the compressed network; {_LARGEST_DIFFERENCE:g} is allowed"
            )


def _about(run: DictConfig, prepared: Prepared, compressed: CompressionResult) -> dict:
    names = [report.name for report in compressed.layers]
    sizes = size_measures(prepared.network, compressed.model, names)
    return {
        "model": run.model.name,
        "method": run.method.name,
        "form": "+".join(_form(compressed.model.get_submodule(name)) for name in names),
        "relative_tolerance": run.method.relative_tolerance,
        "kept_fraction": sizes["kept_fraction"],
    }


def _measure(module: nn.Module, inputs: Tensor, cfg: DictConfig) -> Measurement:
    timer = Timer(
        "module(inputs)",
        globals={"module": module, "inputs": inputs},
        num_threads=cfg.threads,
    )
    with torch.inference_mode():
        return timer.blocked_autorange(min_run_time=cfg.seconds)


if __name__ == "__main__":
    main()
