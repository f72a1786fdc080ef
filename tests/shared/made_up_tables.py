"""Tables of results with the columns of the real ones and plausible numbers."""

from itertools import pairwise, product

import numpy as np
import pandas as pd

TOLERANCES = (0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5)
KEPT_FRACTIONS = (0.03, 0.05, 0.1, 0.2, 0.4)
SAMPLES = (500, 1000, 2000, 10000, 20000)
# Network to data set, dense accuracy, seeds and the widths of its fully connected layers.
NETWORKS = {
    "lenet_300_100": ("mnist", 98.2, 3, (784, 300, 100, 10)),
    "fc_nettrim": ("mnist", 98.5, 3, (784, 300, 1000, 100, 10)),
    "lenet5": ("mnist", 99.3, 3, (800, 500, 10)),
    "convnet_nettrim": ("cifar10", 79.0, 1, (3136, 384, 192, 10)),
    "vgg_small": ("cifar10", 86.0, 1, (2048, 512, 512, 10)),
    "mlp_digits": ("digits", 97.0, 1, (64, 48, 32, 10)),
}
# Method to how much it keeps, how much accuracy it costs, and whether its layers are sparse.
METHODS = {
    "fewest_weights": (0.045, 9.0, False),
    "lowest_rank": (0.06, 10.0, False),
    "ddlr": (0.09, 11.0, False),
    "nettrim": (0.05, 16.0, True),
    "nettrim_protocol": (0.06, 12.0, True),
    "svd": (0.16, 9.0, False),
    "activation_svd": (0.075, 10.0, False),
    "magnitude": (0.16, 8.0, True),
    "magnitude_global": (0.19, 8.0, True),
}
# In the runs of the ablation alone.
SELECTED = {"activation_svd_selected": (0.05, 9.5, False)}
WITH_ORDERS = ("fewest_weights", "lowest_rank", "ddlr", "nettrim")
VARIANTS = [(refit, order) for refit in ("none", "layer") for order in ("parallel", "cascade")]


def runs(networks: tuple[str, ...], methods: tuple[str, ...]) -> list[dict]:
    """What the runs of the whole comparison are.

    The grids of tolerances; more samples on one network; and shares of the weights that are to be
    kept, each layer with its own tolerance. With both goals, all layers are refitted together too.
    """
    grid = []
    for network in networks:
        for method in methods:
            if method == "nettrim_protocol" and network != "fc_nettrim":
                continue
            ordered = method in WITH_ORDERS
            if method == "nettrim_protocol":
                variants, goals = [("none", "cascade")], []
            elif ordered:
                variants = [*VARIANTS, ("network", "parallel")]
                goals = [VARIANTS[0], VARIANTS[-1], ("network", "cascade")]
            else:
                goals = variants = [("none", "parallel"), ("network", "parallel")]
            for refit, order in variants:
                here = {"model": network, "method": method, "refit": refit, "order": order}
                grid += [here | {"tolerance": each, "samples": 5000} for each in TOLERANCES]
                if ordered and network == "lenet_300_100" and (refit, order) in VARIANTS[::2]:
                    grid += [here | {"tolerance": 0.12, "samples": each} for each in SAMPLES]
            for refit, order in goals:
                here = {"model": network, "method": method, "refit": refit, "order": order}
                grid += [here | {"kept": each, "samples": 5000} for each in KEPT_FRACTIONS]
    return [run | {"seed": seed} for run in grid for seed in range(NETWORKS[run["model"]][2])]


def made_up_tables(
    networks: tuple[str, ...] = tuple(NETWORKS), methods: tuple[str, ...] = tuple(METHODS)
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`sweeps.csv` and `layers.csv` of the whole comparison, or of some networks and methods."""
    random = np.random.default_rng(0)
    rows, layers = [], []
    for number, run in enumerate(runs(networks, methods)):
        row, its_layers = _run(f"run{number:05d}", run, random)
        rows.append(row)
        layers += its_layers
    return pd.DataFrame(rows), pd.DataFrame(layers)


def made_up_ablation(networks: tuple[str, ...] = ("lenet_300_100", "lenet5")) -> pd.DataFrame:
    """The rows of `sweeps.csv` that the ablation is about: given sizes, three seeds."""
    random = np.random.default_rng(1)
    variants = [("activation_svd", *VARIANTS[0]), ("activation_svd_selected", *VARIANTS[0])]
    for method in ("lowest_rank", "fewest_weights"):
        variants += [(method, *each) for each in (VARIANTS[0], *VARIANTS[2:])]
    rows = []
    for number, (network, (method, refit, order), kept, seed) in enumerate(
        product(networks, variants, KEPT_FRACTIONS, range(3))
    ):
        run = {"model": network, "method": method, "refit": refit, "order": order, "seed": seed}
        rows.append(_run(f"step{number:05d}", run | {"kept": kept, "samples": 5000}, random)[0])
    return pd.DataFrame(rows)


def _run(key: str, run: dict, random: np.random.Generator) -> tuple[dict, list[dict]]:
    dataset, dense, _, widths = NETWORKS[run["model"]]
    keeps, costs, sparse = {**METHODS, **SELECTED}[run["method"]]
    refitted, cascade = run["refit"] != "none", run["order"] == "cascade"
    together = run["refit"] == "network"
    few = (5000 / run["samples"]) ** 0.5
    kept_fraction = run.get("kept")
    # With a tolerance of its own a layer gives more where that costs less.
    tolerance = run.get("tolerance") or 0.7 * (keeps / kept_fraction) ** (4 / 3)
    shapes = list(pairwise(widths))
    tolerances = [tolerance * (1 if kept_fraction is None else 1.3**i) for i in range(len(shapes))]
    shares = [
        min(1.0, keeps * of_layer**-0.75 * (0.6 + 0.5 * i) * random.uniform(0.95, 1.05) / few**0.3)
        for i, of_layer in enumerate(tolerances)
    ]
    if kept_fraction is not None:
        total = sum(inputs * outputs for inputs, outputs in shapes)
        found = sum(
            share * inputs * outputs
            for share, (inputs, outputs) in zip(shares, shapes, strict=True)
        )
        shares = [min(1.0, share * kept_fraction * total / found) for share in shares]
    about = {
        "run": key,
        "dataset": dataset,
        "model": run["model"],
        "method": run["method"],
        "constraint": "nettrim" if run["method"].startswith(("ddlr", "nettrim")) else "hinge",
        "refit": run["refit"],
        "order": run["order"],
        "seed": run["seed"],
    }
    layers = []
    for index, (inputs, outputs) in enumerate(shapes):
        kept = int(shares[index] * inputs * outputs)
        error = tolerances[index] * (random.uniform(0.6, 0.75) if refitted else 1.0)
        layers.append(
            {
                **about,
                "layer": f"fc{index + 1}",
                "in_features": inputs,
                "out_features": outputs,
                "activation": "none" if index == len(widths) - 2 else "relu",
                "form": "sparse" if sparse else "low_rank",
                "rank": min(inputs, outputs) if sparse else max(1, kept // (inputs + outputs)),
                "nonzeros": kept if sparse else inputs * outputs,
                "parameters_kept": kept,
                "parameters_dense": inputs * outputs,
                "bytes_stored": min(4 * inputs * outputs, kept * (6 if sparse else 4)),
                "relative_error": error,
                "relative_error_read": error,
                "relative_error_held_out": error * (1 + 0.15 * few * random.uniform(0.8, 1.2)),
                "relative_tolerance": tolerances[index],
                "violation": 2e-4,
                "status": "converged",
                "relative_gap": 5e-3,
                "iterations": 100,
                "seconds": 1.0,
            }
        )
    total = {
        column: sum(layer[column] for layer in layers)
        for column in ("parameters_dense", "parameters_kept", "bytes_stored")
    }
    drop = costs * tolerance**1.5 * (0.5 if refitted else 1) * (0.6 if cascade else 1) * few**0.5
    drop *= 0.3 if together else 1
    drop = drop * random.uniform(0.9, 1.1) + random.uniform(-0.05, 0.05)
    dense += 0.05 * run["seed"]
    error = tolerance * len(layers) ** 0.5 * (0.7 if refitted else 1) * random.uniform(0.9, 1.1)
    row = {
        **about,
        "goal": "relative_tolerance" if kept_fraction is None else "kept_fraction",
        "wanted": tolerance if kept_fraction is None else kept_fraction,
        "relative_tolerance": tolerance if kept_fraction is None else float("nan"),
        "cascade_bound": "tolerance",
        "network_refit": "",
        "ridge": 0.01,
        "calibration_samples": run["samples"],
        **total,
        "kept_fraction": total["parameters_kept"] / total["parameters_dense"],
        "bytes_dense": 4 * total["parameters_dense"],
        "accuracy_dense": dense,
        "accuracy": dense - drop,
        "accuracy_drop": drop,
        "accuracy_dense_held_out": dense - 0.2,
        "accuracy_held_out": dense - 0.2 - drop * 1.05,
        "accuracy_drop_held_out": drop * 1.05,
        "output_error": error,
        "output_error_held_out": error * 1.1,
        "output_bound": float("nan") if cascade else 4 ** len(layers) * tolerance,
        "worst_violation": 2e-4,
        "worst_relative_gap": 5e-3,
        "status": "converged",
        "seconds": 3.0,
    }
    return row, layers


def made_up_inference(networks: tuple[str, ...] = ("lenet_300_100", "lenet5", "vgg_small")):
    """`inference.csv`: low-rank networks gain with the batch, more so fused; sparse ones do not."""
    rows = []
    for network, engine, threads, batch, form in product(
        networks, ("torch", "onnxruntime"), (1, 2), (1, 32, 256), ("stored", "fused")
    ):
        dense = 40.0 * batch**0.8 / threads**0.5 * (0.8 if engine == "onnxruntime" else 1)
        for method, kept in (("fewest_weights", 0.05), ("ddlr", 0.2), ("nettrim", 0.1)):
            share = {"stored": 0.25, "fused": 0.5}[form] * (batch / 256) ** 0.2
            share *= 0.2 if method == "nettrim" else 1
            rows.append(
                {
                    "dataset": "mnist",
                    "model": network,
                    "method": method,
                    "refit": "layer",
                    "order": "cascade" if method == "fewest_weights" else "parallel",
                    "seed": 0,
                    "calibration_samples": 5000,
                    "accuracy_drop_held_out": 0.9,
                    "layers": "low_rank+dense",
                    "kept_fraction": kept,
                    "multiplications": int(kept * 266200),
                    "multiplications_dense": 266200,
                    "promised": 1 / kept,
                    "file_bytes": int(kept * 4 * 266200),
                    "load_milliseconds": 2.0,
                    "file_bytes_dense": 4 * 266200,
                    "load_milliseconds_dense": 3.0,
                    "form": form,
                    "engine": engine,
                    "threads": threads,
                    "batch": batch,
                    "microseconds": dense * kept / share,
                    "microseconds_dense": dense,
                    "speedup": share / kept,
                    "share_of_promise": share,
                }
            )
    return pd.DataFrame(rows)


def made_up_spectrum() -> pd.DataFrame:
    """`spectrum.csv`: shrunk singular values, and refitted ones close to the original's."""
    index = np.arange(1, 301)
    original = 10 * np.exp(-index / 60)
    lines = {
        ("original", "none"): original,
        ("ddlr", "none"): np.maximum(original - 3, 0),
        ("ddlr", "layer"): np.where(index < 72, original * 0.95, 0),
        ("activation_svd", "none"): np.where(index < 60, original, 0),
    }
    tables = [
        pd.DataFrame(
            {
                "model": "lenet_300_100",
                "layer": "fc1",
                "method": method,
                "refit": refit,
                "relative_tolerance": None if method == "original" else 0.12,
                "metric": metric,
                "index": index,
                "value": values * scale,
            }
        ).query("value > 0")
        for metric, scale in (("plain", 1.0), ("input", 0.5))
        for (method, refit), values in lines.items()
    ]
    return pd.concat(tables, ignore_index=True)
