"""An ONNX file in, a smaller ONNX file out: no PyTorch model needed. Takes a path, or makes a file to prune.

    python examples/onnx_file.py my_model.onnx
"""

import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import nn

import graphprune as gp


def made_up(path: Path) -> Path:
    """A small network exported to ONNX."""
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU())
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    torch.onnx.export(model, (torch.randn(1, 3, 24, 24),), path, input_names=["image"], output_names=["logits"], dynamo=True, verbose=False)
    return path


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(sys.argv[1]) if len(sys.argv) > 1 else made_up(Path(folder) / "in.onnx")
        program = gp.capture(source)
        print(f"{source.name}: {len(program.groups)} groups of units can be cut")

        result = gp.compile(program, pruning_ratio=0.3)
        small = Path(folder) / "out.onnx"
        result.save(small)
        print(result.report)

        session = onnxruntime.InferenceSession(small, providers=["CPUExecutionProvider"])
        feeds = {value.name: example.numpy() for value, example in zip(program.inputs, program.example_inputs)}
        print("outputs of the smaller file:", [output.shape for output in session.run(None, feeds)])


if __name__ == "__main__":
    main()
