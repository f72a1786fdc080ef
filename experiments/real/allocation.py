"""What each layer of a large network is worth, measured so that it does not take all day.

The search for a goal compresses each layer by itself at each tolerance, and runs the network each
time. Three things make that affordable here: few tolerances; few samples; and one allocation for
all methods, found by a closed form and kept in a file. Then methods differ in what they make of a
layer, and not in where they save.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ddlr
from ddlr.allocate import layer_options
from ddlr.goals import Option
from ddlr.method import Method
from ddlr.walk import WalkSettings
from experiments.real.network import RealNetwork
from experiments.runs.records import write_json

log = logging.getLogger(__name__)

Options = dict[str, list[Option]]


def measured_options(network: RealNetwork, method: Method, tolerances: Sequence[float]) -> Options:
    """Size and effect of each layer at each tolerance, measured on `Data.searching` alone.

    Parameters
    ----------
    method : Method
        A quick one; it decides how an error of a layer is spread over its outputs.
    tolerances : sequence of float
    """
    captured = ddlr.capture_layers(
        network.model, network.data.searching, layers=network.layers, forward=network.forward
    )
    return layer_options(
        network.model,
        captured,
        method,
        WalkSettings(raise_on_failure=False),
        tolerances,
        output=network.output,
    )


def kept_options(path: Path, made_by: dict[str, Any], measure: Callable[[], Options]) -> Options:
    """Options from a file, or measured and written to it.

    Parameters
    ----------
    made_by : dict
        What determines them; a file that was made by something else is not used.
    measure : callable
        Is called without arguments where there is no such file.
    """
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["made_by"] == made_by:
            return _from_json(content["options"])
        log.info("%s was made by other settings; measuring anew", path)
    options = measure()
    write_json(path, {"made_by": made_by, "options": _as_json(options)})
    return options


def _as_json(options: Options) -> dict[str, list[dict]]:
    return {name: [dataclasses.asdict(one) for one in each] for name, each in options.items()}


def _from_json(content: dict[str, list[dict]]) -> Options:
    return {name: [Option(**one) for one in each] for name, each in content.items()}
