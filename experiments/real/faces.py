"""The heads of a face detector that others trained: MTCNN's second and third stage.

RNet (linear layers 576-128-(2, 4)) and ONet (1152-256-(2, 4, 10)) with PReLU, from the wheel
`facenet-pytorch`. They are judged on windows of the two photographs that scikit-learn holds. These
show no face, so what is judged is how near the outputs stay to those of the original, not whether
faces are found.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments import vision  # noqa: F401  facenet_pytorch imports torchvision
from experiments.real.network import Data, RealNetwork, variance_explained

# As in the detector: of windows from one level of the image pyramid to the next, and of inputs.
_PYRAMID = 0.709
_MIDDLE, _SCALE = 127.5, 0.0078125
_PIXELS = {"RNet": 24, "ONet": 48}
# Vertical strips of the photographs, as shares of their width: to calibrate, choose and judge on.
_STRIPS = ((0.0, 0.5), (0.5, 0.7), (0.7, 1.0))
_LEVELS = 5


def load(
    stage: str,
    calibration_samples: int,
    searching_samples: int,
    choosing_samples: int,
    judging_samples: int,
    *,
    batch: int = 500,
    seed: int = 0,
) -> RealNetwork:
    """One stage of the detector, with windows of photographs for it.

    Parameters
    ----------
    stage : {"RNet", "ONet"}
    calibration_samples, searching_samples, choosing_samples, judging_samples : int
        Windows, see `Data`; sets lie in strips of the photographs of their own.
    """
    try:
        import facenet_pytorch
    except ImportError as error:
        raise ImportError(
            f"the face detector can not be imported ({error}): "
            "pip install requests pillow; pip install --no-deps facenet-pytorch"
        ) from error
    sizes = (calibration_samples, choosing_samples, judging_samples)
    calibration, choosing, judging = (
        windows(strip, _PIXELS[stage], count, seed)
        for strip, count in zip(_STRIPS, sizes, strict=True)
    )
    sets = (calibration, calibration[:searching_samples], choosing, judging)
    return RealNetwork(
        name=f"mtcnn_{stage.lower()}",
        model=getattr(facenet_pytorch, stage)().eval(),
        data=Data(*(each.split(batch) for each in sets)),
        forward=joined,
        output=_missing_variance,
        measure="variance_explained",
        quality=variance_explained,
    )


def _missing_variance(original: Tensor, outputs: Tensor) -> float:
    return 1 - variance_explained(original, outputs)


def windows(strip: tuple[float, float], pixels: int, count: int, seed: int) -> Tensor:
    """Square windows of photographs, as the detector cuts and scales them.

    Parameters
    ----------
    strip : (float, float)
        The part of the photographs they lie in, as shares of the width from the left.
    pixels : int
        Width and height that windows are scaled to.

    Returns
    -------
    Tensor, shape (count, 3, pixels, pixels)
    """
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(seed)
    photographs = [torch.tensor(image) for image in load_sample_images().images]
    left, right = strip
    cut = []
    for _ in range(count):
        photograph = photographs[_below(len(photographs), generator)]
        height, width, _channels = photograph.shape
        first, last = int(left * width), int(right * width)
        level = _below(_LEVELS, generator)
        size = round(min(height, last - first) * _PYRAMID**level)
        top = _below(height - size + 1, generator)
        side = first + _below(last - first - size + 1, generator)
        window = photograph[top : top + size, side : side + size].permute(2, 0, 1)[None].float()
        cut.append(functional.interpolate(window, (pixels, pixels), mode="area"))
    return (torch.cat(cut) - _MIDDLE) * _SCALE


def joined(model: nn.Module, batch: Tensor) -> Tensor:
    """All that a stage says of windows: boxes, landmarks, and the logit of a face.

    Shape (windows, numbers). The logit is that of the two probabilities that the network gives.
    """
    *positions, probabilities = model(batch)
    logit = probabilities[:, 1:].logit(eps=1e-7)
    return torch.cat([*positions, logit], dim=1)


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))
