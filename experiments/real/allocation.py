"""What each layer of a large network is worth, measured so that it does not take all day.

The search for a goal compresses each layer by itself at each tolerance, and runs the network each
time. Three things make that affordable here: few tolerances; few samples; and one allocation for
all methods, found by a closed form and kept in a file. Then methods differ in what they make of a
layer, and not in where they save.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
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


class MeasuredOptions:
    """What layers are worth at tolerances, by one method, kept in a file.

    Parameters
    ----------
    path : Path
        Of the file; a tolerance is added as soon as all layers are measured at it.
    made_by : dict
        What determines the measurements; a file of others is not used.
    """

    def __init__(self, path: Path, made_by: dict[str, Any]):
        self._path, self._made_by = path, made_by
        # By tolerance, as JSON has it: layers to their option at it, where that is smaller.
        self._known: dict[str, dict[str, dict]] = {}
        self._dense: dict[str, dict] = {}
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["made_by"] == made_by:
                self._known, self._dense = content["tolerances"], content["dense"]

    def at(self, tolerances: Sequence[float], network: RealNetwork, method: Method) -> Options:
        """The options of each layer; what the file does not have is measured and added to it.

        On `Data.searching` alone. `method` should be a quick one; it decides how an error of a
        layer is spread over its outputs.
        """
        missing = [each for each in sorted(tolerances) if str(each) not in self._known]
        if missing:
            captured = ddlr.capture_layers(
                network.model,
                network.data.searching,
                layers=network.layers,
                forward=network.forward,
            )
        for tolerance in missing:
            measured = layer_options(
                network.model,
                captured,
                method,
                WalkSettings(raise_on_failure=False),
                [tolerance],
                output=network.output,
            )
            self._add(tolerance, measured)
        return {name: self._of_layer(name, tolerances) for name in self._dense}

    def _add(self, tolerance: float, measured: Options) -> None:
        self._dense = {name: dataclasses.asdict(each[0]) for name, each in measured.items()}
        self._known[str(tolerance)] = {
            name: dataclasses.asdict(each[1]) for name, each in measured.items() if len(each) > 1
        }
        content = {"made_by": self._made_by, "dense": self._dense, "tolerances": self._known}
        write_json(self._path, content)
        log.info("measured all layers at a tolerance of %g", tolerance)

    def _of_layer(self, name: str, tolerances: Sequence[float]) -> list[Option]:
        """From the layer as it is to the smallest; an option that is no smaller is left out."""
        options = [Option(**self._dense[name])]
        for tolerance in sorted(tolerances):
            option = self._known[str(tolerance)].get(name)
            if option is not None and option["parameters"] < options[-1].parameters:
                options.append(Option(**option))
        return options
