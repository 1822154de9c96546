"""Tiny ONNX models, at least one for every operator that has a dim rule: what the rule checker runs.

A row is an operator, its inputs (a shape stands for normal numbers, a `Fixed` for a constant of the model), and attributes; weights
are inputs, so that they become members. Longer rows are several nodes. Sizes are distinct and awkward, so that equal sizes never stand in
for equal axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from graphprune.capture.onnx_file import capture_onnx
from graphprune.program import Program
from tests.randomise import seeded


@dataclass(frozen=True)
class Fixed:
    """A constant of the model."""

    value: Any
    dtype: Any = np.int64

    def array(self) -> np.ndarray:
        return np.asarray(self.value, dtype=self.dtype)


Input = tuple[int, ...] | Callable[[], Tensor] | Fixed | None
Step = tuple[str, Sequence[str], Sequence[str], dict[str, Any]]  # operator, inputs, outputs, attributes


@dataclass(frozen=True)
class Sample:
    """One operator under test, in a model of its own."""

    op: str
    name: str
    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    opset: int = 18
    blind: bool = False  # the result depends on the shape of the input only, so that a shifted cut cannot be noticed

    def model(self) -> tuple[onnx.ModelProto, list[Tensor]]:
        with seeded(crc32(self.name.encode())):
            makers = {f"x{i}": x for i, x in enumerate(self.inputs) if isinstance(x, tuple) or callable(x)}
            given = {name: torch.randn(x) if isinstance(x, tuple) else x() for name, x in makers.items()}
        kinds = {name: helper.np_dtype_to_tensor_dtype(t.numpy().dtype) for name, t in given.items()}
        graph = helper.make_graph(
            [helper.make_node(op, ins, outs, name=f"{op}_{i}", **attributes) for i, (op, ins, outs, attributes) in enumerate(self.steps)],
            "sample",
            [helper.make_tensor_value_info(name, kinds[name], list(t.shape)) for name, t in given.items()],
            [helper.make_empty_tensor_value_info(name) for name in self.outputs],
            [numpy_helper.from_array(x.array(), f"x{i}") for i, x in enumerate(self.inputs) if isinstance(x, Fixed)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        return model, list(given.values())

    def program(self) -> Program:
        return capture_onnx(*self.model())


SAMPLES: list[Sample] = []


def _add(op: str, inputs: Sequence[Input], steps: Sequence[Step], outputs: Sequence[str], opset: int, blind: bool) -> None:
    count = sum(s.op == op for s in SAMPLES)
    SAMPLES.append(Sample(op, f"{op}-{count}", tuple(inputs), tuple(steps), tuple(outputs), opset, blind))


def sample(ops: str, *inputs: Input, outputs: int = 1, opset: int = 18, blind: bool = False, **attributes: Any) -> None:
    """Rows of one node."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    results = [f"y{i}" for i in range(outputs)]
    for op in ops.split():
        _add(op, inputs, [(op, names, results, attributes)], results, opset, blind)


def chain(op: str, inputs: Sequence[Input], *steps: Step, outputs: Sequence[str] = ("y",), opset: int = 18, blind: bool = False) -> None:
    """A row of several nodes."""
    _add(op, inputs, steps, outputs, opset, blind)


def ints(high: int, *shape: int) -> Input:
    return lambda: torch.randint(high, shape)


def bools(*shape: int) -> Input:
    return lambda: torch.rand(shape) > 0.4


def positive(*shape: int) -> Input:
    return lambda: torch.rand(shape) + 0.5


# ---- products and contractions

sample("MatMul", (2, 3, 5, 7), (2, 3, 7, 11))
sample("MatMul", (2, 3, 5, 7), (7, 11))
sample("MatMul", (5, 7), (2, 3, 7, 11))
sample("MatMul", (2, 5, 7), (7,))
sample("MatMul", (7,), (7, 5))
sample("MatMul", (7,), (7,))
chain(
    "MatMul",
    [(5, 7), (7, 11), (11, 3)],
    ("MatMul", ["x0", "x1"], ["h"], {}),
    ("Relu", ["h"], ["r"], {}),
    ("MatMul", ["r", "x2"], ["y"], {}),
)
sample("Gemm", (5, 7), (7, 3), (3,))
sample("Gemm", (5, 7), (3, 7), (3,), transB=1, alpha=0.5)
sample("Gemm", (7, 5), (3, 7), (5, 3), transA=1, transB=1, beta=2.0)
sample("Gemm", (5, 7), (7, 3), (5, 1))
sample("Gemm", (5, 7), (7, 3), (1, 3))
sample("Gemm", (5, 7), (7, 3))
sample("Einsum", (2, 5, 7), (2, 3, 7), equation="bik,bjk->bij", opset=18)
sample("Einsum", (2, 5, 7), (7, 3), equation="...i,ij")
sample("Einsum", (5, 5, 7), equation="iij->j")
sample("Conv", (2, 6, 9), (4, 6, 3), (4,))
sample("Conv", (2, 6, 9, 8), (8, 3, 3, 3), (8,), group=2, pads=[1, 1, 1, 1])
sample("Conv", (2, 6, 9, 8), (6, 1, 3, 3), group=6)
sample("Conv", (2, 6, 9, 8), (12, 1, 3, 3), group=6)
sample("ConvTranspose", (2, 6, 5, 4), (6, 5, 3, 3), (5,), strides=[2, 2])
sample("ConvTranspose", (2, 6, 5, 4), (6, 5, 3, 3), (10,), group=2)
sample("CausalConvWithState", (2, 5, 9), (5, 1, 4), (5,), (2, 5, 3), outputs=2, opset=27)
sample("Attention", (2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7), opset=24)
sample("Attention", (2, 6, 5, 4), (2, 3, 7, 4), (2, 3, 7, 8), opset=24)
sample("Attention", (2, 5, 24), (2, 7, 12), (2, 7, 15), q_num_heads=6, kv_num_heads=3, opset=24)
sample("Attention", (2, 5, 12), (2, 7, 12), (2, 7, 15), (2, 1, 5, 7), q_num_heads=3, kv_num_heads=3, opset=24)
sample("Attention", (2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7), (2, 3, 5, 6), opset=24)
sample("Attention", (2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7), None, (2, 3, 2, 4), (2, 3, 2, 7), outputs=3, opset=24)
sample("RotaryEmbedding", (2, 3, 5, 8), (2, 5, 4), (2, 5, 4), opset=23)
sample("RotaryEmbedding", (2, 3, 5, 8), (11, 4), (11, 4), ints(11, 2, 5), interleaved=1, opset=23)
sample("RotaryEmbedding", (2, 5, 24), (2, 5, 2), (2, 5, 2), num_heads=3, rotary_embedding_dim=4, opset=23)
sample("LSTM", (7, 2, 5), (1, 24, 5), (1, 24, 6), (1, 48), outputs=3, hidden_size=6)
sample("LSTM", (7, 2, 5), (2, 24, 5), (2, 24, 6), (2, 48), None, (2, 2, 6), (2, 2, 6), outputs=3, hidden_size=6, direction="bidirectional")
sample("LSTM", (7, 2, 5), (1, 24, 5), (1, 24, 6), outputs=1, hidden_size=6, direction="reverse")
sample("GRU", (7, 2, 5), (1, 18, 5), (1, 18, 6), (1, 36), outputs=2, hidden_size=6)
sample("GRU", (7, 2, 5), (2, 18, 5), (2, 18, 6), outputs=2, hidden_size=6, direction="bidirectional", linear_before_reset=1)
sample("GRU", (7, 2, 5), (1, 18, 5), (1, 18, 6), outputs=1, hidden_size=6, activations=["HardSigmoid", "Sigmoid"])
sample("RNN", (7, 2, 5), (1, 6, 5), (1, 6, 6), (1, 12), None, (1, 2, 6), outputs=2, hidden_size=6)

# ---- norms and reductions

sample("BatchNormalization", (3, 5, 4, 7), (5,), (5,), (5,), positive(5))
sample("BatchNormalization", (3, 5), (5,), (5,), (5,), positive(5), opset=9)
sample("InstanceNormalization", (3, 5, 4, 7), (5,), (5,))
chain(
    "InstanceNormalization",
    [(2, 12, 5), (12, 1), Fixed([0, 3, -1]), Fixed([1, 1, 1], np.float32), Fixed([0, 0, 0], np.float32), Fixed([0, 12, -1])],
    ("Reshape", ["x0", "x2"], ["g"], {}),
    ("InstanceNormalization", ["g", "x3", "x4"], ["n"], {}),
    ("Reshape", ["n", "x5"], ["r"], {}),
    ("Mul", ["r", "x1"], ["y"], {}),
)
sample("GroupNormalization", (3, 12, 5), (12,), (12,), num_groups=3, opset=21)
sample("GroupNormalization", (3, 12, 5), (3,), (3,), num_groups=3, opset=18)
sample("GroupNormalization", (3, 12, 5), (12,), (12,), num_groups=12, opset=21)
sample("LayerNormalization", (3, 5, 7), (7,), (7,))
sample("LayerNormalization", (3, 5, 7), (5, 7), axis=1)
sample("LayerNormalization", (3, 5, 7), (7,), (7,), outputs=3)
sample("RMSNormalization", (3, 5, 7), (7,), opset=23)
sample("MeanVarianceNormalization", (3, 5, 4, 7))
sample("LpNormalization", (3, 5, 7), axis=1)
sample("LRN", (3, 7, 5, 4), size=3)
sample("Softmax LogSoftmax Hardmax", (3, 5, 7), axis=1)
sample("Softmax LogSoftmax Hardmax", (3, 5, 7), axis=1, opset=11)
sample("ReduceSum", (3, 5, 7), Fixed([1]))
sample("ReduceSum", (3, 5, 7), keepdims=0)
sample("ReduceSum", (3, 5, 7), axes=[1, 2], keepdims=0, opset=11)
sample("ReduceSum", (3, 5, 7), Fixed(np.zeros(0)), noop_with_empty_axes=1)
sample("ReduceL1 ReduceL2 ReduceSumSquare ReduceMean ReduceMax ReduceMin ReduceProd ReduceLogSumExp", (3, 5, 7), Fixed([1]), keepdims=0)
sample("ReduceLogSum", positive(3, 5, 7), Fixed([1]), keepdims=0)
sample("ReduceMean ReduceMax", (3, 5, 7), axes=[-1], keepdims=1, opset=13)
sample("ArgMax ArgMin", (3, 5, 7), axis=1)
chain("ArgMax", [(3, 5), (5, 7)], ("ArgMax", ["x0"], ["i"], {"axis": 1, "keepdims": 0}), ("Gather", ["x1", "i"], ["y"], {}))
sample("CumSum", (3, 5, 7), Fixed(1))
sample("CumProd", (3, 5, 7), Fixed(1), opset=26)
sample("ReverseSequence", (5, 3, 7), Fixed([2, 4, 5]))
sample("Trilu", (3, 5, 5))

# ---- shapes

sample("Reshape", (3, 10, 7), Fixed([3, 2, 5, 7]))
sample("Reshape", (3, 2, 5, 7), Fixed([0, -1, 7]))
sample("Reshape", (3, 10, 7), Fixed([0, 2, -1, 7]))
chain(
    "Reshape",
    [(3, 5), (5, 12), Fixed([3, 4, 3])],
    ("MatMul", ["x0", "x1"], ["h"], {}),
    ("Reshape", ["h", "x2"], ["r"], {}),
    ("Transpose", ["r"], ["y"], {"perm": [1, 0, 2]}),
)
sample("Flatten", (3, 2, 5, 7), axis=2)
sample("Squeeze", (3, 1, 5, 1), Fixed([1, 3]))
sample("Squeeze", (3, 1, 5, 1))
sample("Unsqueeze", (3, 5), Fixed([0, 2]))
sample("Unsqueeze", (3, 5), axes=[1], opset=11)
sample("Transpose", (3, 5, 7), perm=[2, 0, 1])
sample("Transpose", (3, 5, 7))
sample("Concat", (3, 5, 7), (3, 2, 7), axis=1)
sample("Split", (3, 12, 5), Fixed([5, 7]), outputs=2, axis=1)
sample("Split", (3, 12, 5), outputs=3, axis=1, num_outputs=3)
sample("Split", (3, 12, 5), outputs=2, axis=-2, opset=11, split=[5, 7])
sample("Split", (3, 12, 5), outputs=2, axis=1, opset=13)
_at = [("SequenceAt", ["s", f"x{i}"], [f"y{i}"], {}) for i in (2, 3)]
for _lengths in ([5, 7], 6, 7):
    chain(
        "SplitToSequence", [(3, 12, 5), Fixed(_lengths), Fixed(0), Fixed(-1)],
        ("SplitToSequence", ["x0", "x1"], ["s"], {"axis": 1}), *_at, outputs=("y2", "y3"),
    )
chain(
    "SequenceAt", [(3, 12, 5), Fixed([5, 7]), Fixed(1)],
    ("SplitToSequence", ["x0", "x1"], ["s"], {"axis": 1}), _at[0], ("Relu", ["y2"], ["y"], {}),
)
chain(
    "SplitToSequence", [(3, 12, 5), Fixed(6)],
    ("SplitToSequence", ["x0", "x1"], ["s"], {"axis": 1}), ("ConcatFromSequence", ["s"], ["y"], {"axis": 2}),
)
chain("SequenceConstruct", [(3, 5), (3, 5), Fixed(1)], ("SequenceConstruct", ["x0", "x1"], ["s"], {}), _at[0], outputs=("y2",))
chain(
    "SequenceInsert", [(3, 5), (3, 5), Fixed(1)],
    ("SequenceConstruct", ["x0"], ["r"], {}), ("SequenceInsert", ["r", "x1"], ["s"], {}), _at[0], outputs=("y2",),
)
sample("Slice", (3, 12, 5), Fixed([2, 1]), Fixed([9, 100]), Fixed([1, 2]))
sample("Slice", (3, 12, 5), Fixed([0]), Fixed([100]), Fixed([1]), Fixed([3]))
sample("Slice", (3, 12, 5), Fixed([-1]), Fixed([-100]), Fixed([1]), Fixed([-1]))
sample("Slice", (3, 12, 5), axes=[1], starts=[2], ends=[-3], opset=9)
chain(
    "Slice",
    [(3, 12), Fixed([0]), Fixed([6]), Fixed([12]), Fixed([1])],
    ("Slice", ["x0", "x1", "x2", "x4"], ["a"], {}),
    ("Slice", ["x0", "x2", "x3", "x4"], ["b"], {}),
    ("Sigmoid", ["b"], ["g"], {}),
    ("Mul", ["a", "g"], ["y"], {}),
)
sample("Expand", (3, 1, 7), Fixed([3, 5, 7]))
sample("Expand", (5, 1), Fixed([2, 1, 7]))
sample("Tile", (3, 5), Fixed([2, 3]))
sample("Pad", (3, 5, 7), Fixed([0, 1, 0, 0, 2, 0]))
sample("Pad", (3, 5, 7), Fixed([0, 1, 0, 0, 2, 0]), Fixed(1.5, np.float32))
sample("Pad", (3, 5, 7), Fixed([1, 2]), None, Fixed([1]))
sample("Pad", (3, 5, 7), Fixed([0, 1, 0, 0, 2, 0]), mode="reflect")
sample("Pad", (3, 5, 7), Fixed([0, -1, 0, 0, 2, 0]))
sample("Pad", (3, 5, 7), pads=[0, 1, 0, 0, 2, 0], value=0.5, opset=9)
sample("CenterCropPad", (3, 5, 7), Fixed([8, 4]), axes=[1, 2])
sample("Resize", (2, 3, 5, 4), None, Fixed([1, 1, 2, 2], np.float32))
sample("Resize", (2, 3, 5, 4), None, None, Fixed([2, 3, 7, 9]), mode="linear")
sample("Resize", (2, 3, 5, 4), None, None, Fixed([7, 9]), mode="linear", axes=[2, 3])
REGION = Fixed([0, 0, 0.2, 0.2, 1, 1, 0.8, 0.8], np.float32)
sample("Resize", (2, 3, 5, 4), REGION, None, Fixed([2, 3, 4, 4]), coordinate_transformation_mode="tf_crop_and_resize")
sample("Upsample", (2, 3, 5, 4), Fixed([1, 1, 2, 2], np.float32), opset=9)
sample("DepthToSpace", (2, 12, 3, 5), blocksize=2)
sample("DepthToSpace", (2, 12, 3, 5), blocksize=2, mode="CRD")
sample("SpaceToDepth", (2, 3, 6, 10), blocksize=2)
sample("GridSample", (2, 3, 5, 4), (2, 6, 7, 2))
sample("MaxPool AveragePool LpPool", (2, 3, 7, 8), kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])
sample("MaxPool", (2, 3, 7), kernel_shape=[3], outputs=2)
sample("GlobalAveragePool GlobalMaxPool GlobalLpPool", (2, 3, 7, 8))
sample("Shape Size", (3, 5, 7), blind=True)
chain(
    "Shape",
    [(3, 5), (5, 7), Fixed(1)],
    ("MatMul", ["x0", "x1"], ["h"], {}),
    ("Shape", ["h"], ["s"], {}),
    ("Gather", ["s", "x2"], ["n"], {}),
    ("Cast", ["n"], ["f"], {"to": 1}),
    ("Sqrt", ["f"], ["r"], {}),
    ("Div", ["h", "r"], ["y"], {}),
)
chain("ConstantOfShape", [(3, 5)], ("Shape", ["x0"], ["s"], {}), ("ConstantOfShape", ["s"], ["z"], {}), ("Add", ["x0", "z"], ["y"], {}))
one = helper.make_tensor("value", onnx.TensorProto.FLOAT, [1], [1.0])
ones: Step = ("ConstantOfShape", ["s"], ["z"], {"value": one})
chain("ConstantOfShape", [(3, 5)], ("Shape", ["x0"], ["s"], {}), ones, ("Mul", ["x0", "z"], ["y"], {}))
BOUNDS = [Fixed(bound, np.float32) for bound in (0.0, 7.0, 1.0)]
chain("Range", [(5, 7), *BOUNDS], ("Range", ["x1", "x2", "x3"], ["r"], {}), ("Mul", ["x0", "r"], ["y"], {}))
chain("RandomNormal", [(5, 7)], ("RandomNormal", [], ["r"], {"shape": [5, 7]}), ("Mul", ["x0", "r"], ["y"], {}))
chain("RandomUniform", [(5, 7)], ("RandomUniform", [], ["r"], {"shape": [5, 7]}), ("Mul", ["x0", "r"], ["y"], {}))
sample("RandomNormalLike RandomUniformLike", (5, 7), blind=True)
sample("Bernoulli", lambda: torch.rand(5, 7), blind=True)
sample("EyeLike", (5, 7), blind=True)
for window in ("BlackmanWindow", "HammingWindow", "HannWindow"):
    chain(window, [(5, 7), Fixed(7)], (window, ["x1"], ["w"], {}), ("Mul", ["x0", "w"], ["y"], {}))

# ---- indices

sample("Gather", (11, 7), ints(11, 2, 5))
sample("Gather", (3, 11, 7), Fixed(2), axis=1)
sample("Gather", (3, 11, 7), Fixed([3, 4, 5]), axis=1)
sample("Gather", (3, 11, 7), Fixed([5, 2, 2]), axis=1)
sample("Gather", (3, 11, 7), Fixed([[5, 2], [0, 1]]), axis=1)
sample("Gather", (3, 15, 7), Fixed(np.arange(15).reshape(3, 1, 5)), axis=1)
two: Step = ("TopK", ["x0", "x2"], ["v", "i"], {})
chain("Gather", [(3, 5), (5, 7), Fixed([2])], two, ("Gather", ["x1", "i"], ["y"], {}), outputs=("y", "v"))
sample("GatherElements", (3, 11, 7), ints(11, 3, 4, 7), axis=1)
chain("GatherElements", [(3, 5), (3, 5), Fixed([2])], two, ("GatherElements", ["x1", "i"], ["y"], {"axis": 1}))
sample("GatherND", (3, 5, 7), ints(3, 4, 2))
sample("GatherND", (3, 5, 7), ints(3, 4, 1))
last: Step = ("Unsqueeze", ["i", "x3"], ["j"], {})
chain("GatherND", [(3, 5), (5, 7), Fixed([2]), Fixed([-1])], two, last, ("GatherND", ["x1", "j"], ["y"], {}), outputs=("y", "v"))
sample("GatherND", (2, 5, 7), ints(2, 2, 1), batch_dims=1)
sample("Scatter", (3, 5), ints(3, 2, 5), (2, 5), opset=10)
sample("ScatterElements", (3, 11, 7), lambda: torch.rand(3, 11, 7).argsort(1)[:, :4], (3, 4, 7), axis=1)
chain(
    "ScatterElements",
    [(3, 5), (3, 5), Fixed([2])],
    two,
    ("Sub", ["x1", "x1"], ["z"], {}),
    ("ScatterElements", ["z", "i", "v"], ["y"], {"axis": 1, "reduction": "add"}),
    blind=True,
)
sample("ScatterND", (3, 5, 7), lambda: torch.tensor([[0], [2]]), (2, 5, 7))
sample("TopK", (3, 11), Fixed([4]), outputs=2)
sample("TopK", (3, 11), Fixed([4]), outputs=2, largest=0)
best: Step = ("ArgMax", ["x0"], ["i"], {"axis": 1, "keepdims": 0})
chain("OneHot", [(3, 5), Fixed(5), Fixed([0, 1], np.float32)], best, ("OneHot", ["i", "x1", "x2"], ["y"], {}))
sample("OneHot", ints(5, 3), Fixed(5), Fixed([0, 1], np.float32))
sample("NonZero", bools(3, 5))
sample("Compress", (3, 5), Fixed([True, False, True], bool), axis=0)
sample("Unique", ints(5, 9), outputs=1)
chain(
    "NonMaxSuppression",
    [positive(1, 6, 4), positive(1, 2, 6), Fixed([3])],
    ("NonMaxSuppression", ["x0", "x1", "x2"], ["y"], {}),
)

# ---- elementwise

sample("Mul Add Sub Div", (3, 5, 7), (5, 1))
sample("Mul Add Sub", (3, 5, 7), (3, 5, 7))
sample("Mul Add Div Max Min", (3, 5), Fixed(-0.25, np.float32))
sample("Max Min Sum Mean", (3, 5, 7), (5, 1), (3, 1, 7))
sample("Mod", (3, 5), positive(5), fmod=1)
sample("PRelu", (3, 5, 7), (5, 1))
sample("Pow", (3, 5), Fixed(2.0, np.float32))
sample("Pow", positive(3, 5), (5,))
sample("And Or Xor", bools(3, 5), bools(5), blind=True)
sample("BitwiseAnd BitwiseOr BitwiseXor", ints(9, 3, 5), ints(9, 5))
sample("BitShift", lambda: torch.randint(9, (3, 5)).to(torch.uint8), lambda: torch.randint(3, (5,)).to(torch.uint8), direction="LEFT")
sample("BitwiseNot", ints(9, 3, 5))
sample("Not", bools(3, 5))
sample("SwiGLU", (3, 5), (3, 5), opset=28)
sample("Equal Greater GreaterOrEqual Less LessOrEqual", (3, 5), (5,), blind=True)
sample("IsInf IsNaN", (3, 5), blind=True)
sample("Where", bools(3, 5), (3, 5), (5,))
sample("Where", bools(3, 5), (3, 5), Fixed(0.0, np.float32))
sample("Where", bools(3, 5), (3, 5), Fixed(-5.0, np.float32))
sample("Clip", (3, 5), Fixed(0.0, np.float32), Fixed(6.0, np.float32))
sample("Clip", positive(3, 5), Fixed(0.1, np.float32))
sample("Clip", (3, 5), min=0.0, max=6.0, opset=9)
sample("Cast", (3, 5), to=11)
sample("CastLike", (3, 5), ints(3, 2))
sample("BitCast", (3, 5), to=onnx.TensorProto.INT32, opset=26)
sample("Dropout", (3, 5), opset=12)
sample("Asin Atanh", lambda: torch.rand(3, 5) * 0.8)
sample("Acosh", lambda: torch.rand(3, 5) + 1.5)
sample("Log Sqrt Reciprocal", positive(3, 5))
sample("Acos", lambda: torch.rand(3, 5) * 0.8)
sample("Swish", (3, 5), opset=24)
sample(
    "Abs Asinh Atan Ceil Celu Elu Erf Floor HardSwish Identity LeakyRelu Mish Neg Relu Round Selu Shrink Sign Sin Sinh Softsign Tan Tanh "
    "ThresholdedRelu Cos Cosh Exp HardSigmoid Sigmoid Softplus",
    (3, 5),
)
sample("Gelu", (3, 5), opset=20)

# ---- quantized

SCALE, ZERO = Fixed(0.05, np.float32), Fixed(128, np.uint8)
quantize: Step = ("QuantizeLinear", ["x0", "x1", "x2"], ["q"], {})
for op in ("QuantizeLinear", "DequantizeLinear"):
    chain(op, [(3, 5), SCALE, ZERO], quantize, ("DequantizeLinear", ["q", "x1", "x2"], ["y"], {}))
sample("DynamicQuantizeLinear", (3, 5), outputs=3)
sample("MatMulInteger", lambda: torch.randint(9, (3, 5)).to(torch.uint8), lambda: torch.randint(9, (5, 7)).to(torch.uint8))
sample("ConvInteger", lambda: torch.randint(9, (2, 3, 6, 5)).to(torch.uint8), lambda: torch.randint(9, (4, 3, 3, 3)).to(torch.uint8))
QUANTIZED = Fixed(np.arange(35).reshape(5, 7), np.uint8)
sample("QLinearMatMul", lambda: torch.randint(9, (3, 5)).to(torch.uint8), SCALE, ZERO, QUANTIZED, SCALE, ZERO, SCALE, ZERO)
KERNEL = Fixed(np.arange(108).reshape(4, 3, 3, 3) % 9, np.uint8)
sample("QLinearConv", lambda: torch.randint(9, (2, 3, 6, 5)).to(torch.uint8), SCALE, ZERO, KERNEL, SCALE, ZERO, SCALE, ZERO)
