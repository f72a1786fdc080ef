"""Train a baseline network, reproducibly by seed."""

import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from experiments.data import Dataset
from experiments.metrics import accuracy
from experiments.runs.records import write_whole


def train(
    network: nn.Module,
    dataset: Dataset,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    device: torch.device,
    augment: bool = False,
    mixed_precision: bool = False,
    resume: Path | None = None,
) -> None:
    """Minimise the cross entropy on `dataset.train` with AdamW and one cycle of learning rates.

    The network is trained in place, on `device`. All that is random depends on `seed` alone.
    Progress shows the running loss, and after each epoch the accuracy on held-out samples.

    Parameters
    ----------
    augment : bool
        Whether images are mirrored at random, and shifted by up to 4 pixels.
    mixed_precision : bool
        Whether layers compute in bfloat16; weights stay in float32.
    resume : path, optional
        Where the state is kept after each epoch, and taken up from if it is there. Removed at the
        end.

    Raises
    ------
    ValueError
        If the network does not take this data set's images.
    FloatingPointError
        If the loss is no longer finite.
    """
    # Images side by side in memory pixel by pixel: convolutions are faster so.
    network.to(device, memory_format=torch.channels_last).train()
    images, labels = dataset.train.images, dataset.train.labels
    check_fits(network, dataset)
    steps_per_epoch = math.ceil(len(labels) / batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=epochs * steps_per_epoch
    )
    done = _take_up(resume, network, optimizer, schedule)
    change = _augmentation() if augment else None
    steps = {"total": epochs * steps_per_epoch, "initial": done * steps_per_epoch}
    with tqdm(**steps, unit="batch", disable=None) as progress:
        for epoch in range(done, epochs):
            progress.set_description(f"epoch {epoch + 1}/{epochs}")
            # Begun anew in each epoch, so that one can begin with any of them.
            torch.manual_seed(seed * epochs + epoch)
            total = torch.zeros((), device=device)
            for batch in torch.randperm(len(labels)).split(batch_size):
                inputs = images[batch]
                if change is not None:
                    inputs = torch.stack([change(image) for image in inputs])
                inputs = inputs.to(device, memory_format=torch.channels_last)
                with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
                    outputs = network(inputs)
                loss = functional.cross_entropy(outputs.float(), labels[batch].to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach() * len(batch)
                progress.update()
            mean_loss = total.item() / len(labels)
            if not math.isfinite(mean_loss):
                raise FloatingPointError(
                    f"the training loss is {mean_loss} in epoch {epoch + 1}: "
                    f"lower model.training.learning_rate (now {learning_rate})"
                )
            held_out = accuracy(network, dataset.held_out)
            progress.set_postfix(loss=f"{mean_loss:.4f}", held_out=f"{held_out:.2f} %")
            _keep(resume, epoch + 1, network, optimizer, schedule)
    if resume is not None:
        resume.unlink(missing_ok=True)
    network.to(memory_format=torch.contiguous_format).eval()


def _keep(resume: Path | None, epochs: int, *parts) -> None:
    if resume is not None:
        state = {"epochs": epochs, "parts": [part.state_dict() for part in parts]}
        write_whole(resume, lambda scratch: torch.save(state, scratch))


def _take_up(resume: Path | None, *parts) -> int:
    """Load what `_keep` left, if anything; return the number of epochs it had done."""
    if resume is None or not resume.is_file():
        return 0
    state = torch.load(resume, map_location="cpu", weights_only=True)
    for part, kept in zip(parts, state["parts"], strict=True):
        part.load_state_dict(kept)
    return state["epochs"]


def _augmentation():
    """One image to a random change of it, of the kind usual for CIFAR-10."""
    from experiments.vision import transforms

    return transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    )


@torch.no_grad()
def check_fits(network: nn.Module, dataset: Dataset) -> None:
    """Raise a ValueError if the network cannot read the data set's images."""
    image = dataset.train.images[:1]
    try:
        network(image.to(next(network.parameters()).device))
    except RuntimeError as error:
        raise ValueError(
            f"the network does not take images of shape {tuple(image.shape[1:])}, as dataset "
            f"{dataset.name!r} has them; choose a model that fits (mlp_digits for digits)"
        ) from error


def choose_device(name: str, job: int = 0) -> torch.device:
    """``auto`` is the accelerator if there is one, else the CPU; other names are torch's.

    Of several accelerators ``auto`` takes the one at `job` modulo their number, so that jobs that
    run side by side are spread over them.
    """
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, job % torch.accelerator.device_count())
