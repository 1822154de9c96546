"""Import this before torchvision, so that its CUDA wheel (the one on PyPI) also imports beside the CPU wheel of torch.

There its compiled operators do not load, and registering fake kernels for two of them fails for want of their schemas. Declaring the
schemas is enough: no classifier, segmenter or flow network calls them.
"""

import importlib.util
from pathlib import Path

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # the operators live as long as this object
_spec = importlib.util.find_spec("torchvision")

if _spec is not None and _spec.origin is not None and torch.version.cuda is None:
    if "+cu" in Path(_spec.origin).with_name("version.py").read_text():
        for _name in ("nms", "qnms"):
            LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
