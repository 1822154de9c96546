"""Sparse kernels, one file each; `KERNELS` lists them by name."""

from graphprune.backends.kernels import bitmap, block_sparse, block_sparse_conv, two_four, unstructured
from graphprune.backends.kernels.base import Kernel

KERNELS: dict[str, Kernel] = {
    module.KERNEL.name: module.KERNEL for module in (block_sparse, two_four, unstructured, bitmap, block_sparse_conv)
}
