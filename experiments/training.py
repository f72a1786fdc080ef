"""Train a baseline network, reproducibly by seed."""

import math

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from experiments.data import Dataset
from experiments.metrics import accuracy


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
) -> None:
    """Minimise the cross entropy on `dataset.train` with AdamW and one cycle of learning rates.

    The network is trained in place, on `device`. The order of the samples depends on `seed` alone.
    Progress shows the running loss, and after each epoch the accuracy on held-out samples.

    Raises
    ------
    ValueError
        If the network does not take this data set's images.
    FloatingPointError
        If the loss is no longer finite.
    """
    network.to(device).train()
    images, labels = dataset.train.images.to(device), dataset.train.labels.to(device)
    check_fits(network, dataset)
    steps_per_epoch = math.ceil(len(labels) / batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=epochs * steps_per_epoch
    )
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=epochs * steps_per_epoch, unit="batch", disable=None) as progress:
        for epoch in range(epochs):
            progress.set_description(f"epoch {epoch + 1}/{epochs}")
            total = torch.zeros((), device=device)
            order = torch.randperm(len(labels), generator=generator).to(device)
            for batch in order.split(batch_size):
                loss = functional.cross_entropy(network(images[batch]), labels[batch])
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
    network.eval()


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
