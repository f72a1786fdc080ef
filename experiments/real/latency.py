"""How long a network that others trained takes in deployment, before and after compression."""

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.benchmarks.deployed import FORMS, Deployed, speedups, stored_file, times
from experiments.metrics import size_measures
from experiments.real.network import AsCalled
from experiments.real.runs import choices, timed_compression


def latency_rows(cfg: DictConfig) -> list[dict]:
    """Compress a network as `conf/real.yaml` says, and time it; rows of `results/real_latency.csv`.

    `choices` of the run, kept_fraction (of the weights of the layers that are compressed),
    quality (on the samples for judging), file_bytes and load_milliseconds (both also with _dense),
    form ("stored" as it comes out of the file, or "fused" by `ddlr.fuse_chains`), engine, threads,
    batch, microseconds, microseconds_dense (in the same rounds) and speedup: of the network as a
    whole, from its inputs on. Inputs are those of the batch in the middle of the samples for
    judging: sentences of one length, for a network of text.
    """
    torch.set_num_threads(cfg.threads)
    network = instantiate(cfg.network)
    result, _ = timed_compression(cfg, network)
    dense, dense_file = stored_file(network.model, network.model)
    loaded, file = stored_file(result.model, network.model)
    sizes = size_measures(network.model, result.model, [each.name for each in result.layers])
    about = {
        **choices(cfg),
        "kept_fraction": sizes["kept_fraction"],
        "quality": network.quality_of(loaded, network.data.judging),
        **file,
        **{f"{key}_dense": value for key, value in dense_file.items()},
    }
    original, small = (AsCalled(network, each) for each in (network.model, result.model))
    deployed = [Deployed("dense", AsCalled(network, dense), original)]
    deployed += [
        Deployed(f"{cfg.method.name} {form}", AsCalled(network, made(loaded)), small)
        for form, made in FORMS.items()
    ]
    judging = network.data.judging
    measured = times(
        deployed,
        judging[len(judging) // 2],
        batches=cfg.latency.batches,
        threads=sorted(set(cfg.latency.threads)),
        engines=cfg.latency.engines,
        rounds=cfg.latency.rounds,
        seconds=cfg.latency.seconds,
    )
    return list(speedups(pd.DataFrame(measured), {cfg.method.name: about}))
