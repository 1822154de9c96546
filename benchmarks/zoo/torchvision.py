"""Every float model of torchvision that takes tensors, and its one-stage detectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.row import Row, images, row

_CONVNETS = """
alexnet
convnext_tiny convnext_small convnext_base convnext_large
densenet121 densenet161 densenet169 densenet201
efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7
efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l
mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3
mobilenet_v2 mobilenet_v3_large mobilenet_v3_small
regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_x_32gf
regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf regnet_y_32gf regnet_y_128gf
resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d resnext101_64x4d wide_resnet50_2 wide_resnet101_2
shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0
squeezenet1_0 squeezenet1_1
vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn
""".split()

# name -> image size, options of the constructor
_OTHER_CLASSIFIERS: dict[str, tuple[int, dict[str, Any]]] = {
    "googlenet": (64, {"init_weights": False, "aux_logits": False}),
    "inception_v3": (96, {"init_weights": False, "aux_logits": False}),
    "maxvit_t": (224, {}),  # four stages of windows of 7
    "swin_t": (112, {}), "swin_s": (112, {}), "swin_b": (112, {}),
    "swin_v2_t": (128, {}), "swin_v2_s": (128, {}), "swin_v2_b": (128, {}),
    "vit_b_16": (48, {"image_size": 48}), "vit_b_32": (96, {"image_size": 96}), "vit_h_14": (42, {"image_size": 42}),
    "vit_l_16": (48, {"image_size": 48}), "vit_l_32": (96, {"image_size": 96}),
}

_SEGMENTATION = """
deeplabv3_mobilenet_v3_large deeplabv3_resnet50 deeplabv3_resnet101 fcn_resnet50 fcn_resnet101 lraspp_mobilenet_v3_large
""".split()

# name -> batch, (frames, height, width)
_VIDEO: dict[str, tuple[int, tuple[int, int, int]]] = {
    "r3d_18": (2, (4, 32, 32)), "mc3_18": (2, (4, 32, 32)), "r2plus1d_18": (2, (4, 32, 32)),
    "s3d": (1, (16, 224, 224)),  # pools 2x7x7 after a stride of 8x32x32
    "mvit_v1_b": (1, (16, 224, 224)), "mvit_v2_s": (1, (16, 224, 224)),  # sizes are fixed by their position tables
    "swin3d_t": (2, (4, 64, 64)), "swin3d_s": (2, (4, 64, 64)), "swin3d_b": (2, (4, 64, 64)),
}

_FLOW = "raft_large raft_small".split()

# name -> image size. Two-stage detectors are left out: between their stages they need compiled operators.
_DETECTION = {
    "fcos_resnet50_fpn": 128, "retinanet_resnet50_fpn": 128, "retinanet_resnet50_fpn_v2": 128, "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
}


class DenseDetector(nn.Module):
    """All weights of a one-stage detector: what follows is the decoding and suppression of boxes, in lists of varying length."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(x).values()))


def _network(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def network() -> nn.Module:
        from torchvision.models import get_model

        model = get_model(name, weights=None, **options)
        return DenseDetector(model) if name in _DETECTION else model

    return network


def _rows() -> list[Row]:
    def entry(family: str, name: str, inputs: Callable[[], Any], options: dict[str, Any]) -> Row:
        return row(f"torchvision/{name}", family, _network(name, options), inputs)

    return [
        *[entry("classification", name, images(64), {}) for name in _CONVNETS],
        *[entry("classification", name, images(size), options) for name, (size, options) in _OTHER_CLASSIFIERS.items()],
        *[entry("segmentation", name, images(64), {"weights_backbone": None}) for name in _SEGMENTATION],
        *[entry("video", name, images(size, batch), {}) for name, (batch, size) in _VIDEO.items()],
        *[entry("optical flow", name, lambda: (*torch.randn(2, 2, 3, 128, 136), 3), {}) for name in _FLOW],  # three updates
        *[entry("detection", name, images(size), {"weights_backbone": None}) for name, size in _DETECTION.items()],
    ]


ROWS = _rows()
