"""torchvision, importable beside any build of torch.

torchvision's wheel registers operators that are compiled for the CUDA build of torch. Beside a
CPU build, ``import torchvision`` fails with "operator torchvision::nms does not exist", although
nothing here uses that operator. Declaring the two missing operator schemas first lets the import
go through, and datasets, transforms and models work as usual. It is done only when the plain
import fails.
"""

import sys

import torch

_MISSING_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    # The library must outlive the import: its schemas go when it is collected.
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _schema in _MISSING_OPERATORS:
        _library.define(_schema)
    import torchvision

from torchvision.transforms import v2 as transforms  # noqa: E402  once torchvision imports

__all__ = ["torchvision", "transforms"]
