"""The networks of the comparison. Layers that are compressed are called ``fc1``, ``fc2``, ..."""

from collections import OrderedDict
from itertools import pairwise

from torch import nn


def lenet_300_100() -> nn.Sequential:
    """LeNet-300-100 (LeCun et al. 1998): 784-300-100-10, ReLU."""
    return _fully_connected(784, 300, 100, 10)


def mlp_digits() -> nn.Sequential:
    """A small network for the embedded 8 x 8 digits: 64-48-32-10, ReLU."""
    return _fully_connected(64, 48, 32, 10)


def lenet5() -> nn.Sequential:
    """LeNet-5 in the form of Caffe: conv 20, conv 50 (5 x 5, max-pooled), FC 800-500-10.

    As there, the convolutions have no activation of their own.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(800, 500),
            relu1=nn.ReLU(),
            fc2=nn.Linear(500, 10),
        )
    )


def _fully_connected(*widths: int) -> nn.Sequential:
    network = OrderedDict(flatten=nn.Flatten())
    for layer, (before, after) in enumerate(pairwise(widths), start=1):
        network[f"fc{layer}"] = nn.Linear(before, after)
        if layer < len(widths) - 1:
            network[f"relu{layer}"] = nn.ReLU()
    return nn.Sequential(network)
