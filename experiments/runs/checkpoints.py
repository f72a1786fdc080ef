"""Trained networks on disk: a safetensors file and, beside it, a JSON file that says what it is."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from experiments.runs.records import file_sha256, write_json, write_whole


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, or whose two files do not belong together."""


def checkpoint_path(folder: str | Path, model: str, dataset: str, seed: int) -> Path:
    return Path(folder) / f"{model}_{dataset}_seed{seed}.safetensors"


def save_checkpoint(path: Path, network: nn.Module, description: dict) -> None:
    """Write a network's weights, then its description with their hash; each file atomically."""
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    write_whole(path, lambda scratch: save_file(state, scratch))
    write_json(path.with_suffix(".json"), {**description, "sha256": file_sha256(path)})


def load_checkpoint(path: Path, network: nn.Module, training_command: str) -> dict:
    """Load weights into a network, and return the description.

    Raises
    ------
    CheckpointError
        If a file is missing or the weights are not those described; says how to make them.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; make it with\n  {training_command}")
    sidecar = path.with_suffix(".json")
    again = f"{training_command} overwrite=true"
    if not sidecar.is_file():
        raise CheckpointError(f"{sidecar} is missing beside {path.name}; make both with\n  {again}")
    description = json.loads(sidecar.read_text(encoding="utf-8"))
    if file_sha256(path) != description["sha256"]:
        raise CheckpointError(
            f"{path} is not what {sidecar.name} describes; make both with\n  {again}"
        )
    try:
        network.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the network: {error}") from error
    network.eval()
    return description
