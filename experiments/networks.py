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


def fc_nettrim(dropout: float = 0.5) -> nn.Sequential:
    """The fully connected network of Net-Trim's MNIST experiments: 784-300-1000-100-10, ReLU.

    Trained with dropout after each hidden layer, as there.
    """
    return _fully_connected(784, 300, 1000, 100, 10, dropout=dropout)


def convnet_nettrim(dropout: float = 0.5) -> nn.Sequential:
    """Net-Trim's network for CIFAR-10: two convolutions of 64 channels, then FC 3136-384-192-10.

    The convolutions are 5 x 5, each with batch normalisation, ReLU and 3 x 3 max-pooling.
    """
    layers = OrderedDict(normalise=nn.BatchNorm2d(3, affine=False))
    for index, channels in enumerate((3, 64), start=1):
        _add_convolution(layers, index, channels, 64, kernel=5)
        layers[f"pool{index}"] = nn.MaxPool2d(3, stride=2)
    layers["flatten"] = nn.Flatten()
    _add_fully_connected(layers, 64 * 7 * 7, 384, 192, 10, dropout=dropout)
    return nn.Sequential(layers)


def vgg_small(dropout: float = 0.5) -> nn.Sequential:
    """In the style of VGG (Simonyan and Zisserman 2015), for CIFAR-10, with a large FC head.

    3 x 3 convolutions of 32-32-64-64-128-128 channels with batch normalisation and ReLU,
    max-pooled after every second one, then FC 2048-512-512-10.
    """
    layers = OrderedDict(normalise=nn.BatchNorm2d(3, affine=False))
    widths = (3, 32, 32, 64, 64, 128, 128)
    for index, (before, after) in enumerate(pairwise(widths), start=1):
        _add_convolution(layers, index, before, after, kernel=3)
        if index % 2 == 0:
            layers[f"pool{index // 2}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    _add_fully_connected(layers, 128 * 4 * 4, 512, 512, 10, dropout=dropout)
    return nn.Sequential(layers)


def split_at_first_linear(network: nn.Sequential) -> tuple[nn.Sequential, nn.Sequential]:
    """The part that no method changes, and the part from the first fully connected layer on."""
    first = next(i for i, layer in enumerate(network) if isinstance(layer, nn.Linear))
    return network[:first], network[first:]


def _fully_connected(*widths: int, dropout: float = 0.0) -> nn.Sequential:
    layers = OrderedDict(flatten=nn.Flatten())
    _add_fully_connected(layers, *widths, dropout=dropout)
    return nn.Sequential(layers)


def _add_fully_connected(layers: OrderedDict, *widths: int, dropout: float) -> None:
    """Linear layers with ReLU, and dropout if any, between them."""
    for index, (before, after) in enumerate(pairwise(widths), start=1):
        layers[f"fc{index}"] = nn.Linear(before, after)
        if index < len(widths) - 1:
            layers[f"relu{index}"] = nn.ReLU()
            if dropout:
                layers[f"dropout{index}"] = nn.Dropout(dropout)


def _add_convolution(
    layers: OrderedDict, index: int, before: int, after: int, *, kernel: int
) -> None:
    # Without a bias, which the normalisation would take out again.
    layers[f"conv{index}"] = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
    layers[f"norm{index}"] = nn.BatchNorm2d(after)
    layers[f"relu_conv{index}"] = nn.ReLU()
