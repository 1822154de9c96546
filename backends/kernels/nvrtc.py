"""CUDA C++ compiled when first used, by NVRTC, which comes with every CUDA build of torch: no compiler has to be installed.

For the kernels that Triton cannot express: where threads walk through shared memory each at a place of its own.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from graphprune.errors import MissingExtra

SHARED_BYTES_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Function:
    """A compiled kernel on one device."""

    def __init__(self, binary: bytes, name: str, shared_bytes: int) -> None:
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(self._module), binary), "the kernel cannot be loaded")
        _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()), f"there is no kernel {name}")
        if shared_bytes > 48 << 10:
            problem = f"{shared_bytes} bytes of shared memory are more than the device has"
            _check(_driver().cuFuncSetAttribute(self._function, SHARED_BYTES_ATTRIBUTE, shared_bytes), problem)
        self.shared_bytes = shared_bytes

    def __call__(self, grid: tuple[int, int, int], threads: int, arguments: Sequence[Tensor | int]) -> None:
        """Launches on the current stream; tensors become pointers, numbers 32-bit integers."""
        held = [ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(a.data_ptr()) for a in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(item) for item in held))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = _driver().cuLaunchKernel(self._function, *grid, threads, 1, 1, self.shared_bytes, stream, pointers, None)
        _check(code, "the kernel cannot be launched")


def function(source: Path, name: str, constants: Mapping[str, int], shared_bytes: int, device: torch.device) -> Function:
    """The kernel `name` of a file, for `device`, with `constants` as macros; compiled once in a process.

    Raises:
        MissingExtra: this torch was built without CUDA, or its NVRTC is not found.
        RuntimeError: the source does not compile for the device, or the device has less shared memory.
    """
    return _function(source, name, tuple(sorted(constants.items())), shared_bytes, device.index if device.index is not None else 0)


@functools.cache
def _function(source: Path, name: str, constants: tuple[tuple[str, int], ...], shared_bytes: int, device: int) -> Function:
    with torch.cuda.device(device):
        major, minor = torch.cuda.get_device_capability(device)
        return Function(compiled(source, constants, f"sm_{major}{minor}"), name, shared_bytes)


@functools.cache
def compiled(source: Path, constants: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """The binary of a file for an architecture such as "sm_90"."""
    library = _nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    code = source.read_bytes()
    options = [f"--gpu-architecture={architecture}".encode(), *(f"-D{name}={value}".encode() for name, value in constants)]
    _check(library.nvrtcCreateProgram(ctypes.byref(program), code, source.name.encode(), 0, None, None), "NVRTC does not start")
    try:
        failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if failed:
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            told = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, told)
            raise RuntimeError(f"{source.name} does not compile for {architecture}: {told.value.decode()}")
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        binary = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, binary)
        return binary.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        _nvrtc()
    except MissingExtra as problem:
        return str(problem)
    return None


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "").split(".")[0]
    for name in (f"libnvrtc.so.{major}", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise MissingExtra(f"CUDA kernels need NVRTC {major}, which comes with torch for CUDA: install a build of torch for CUDA")


def _check(code: int, problem: str) -> None:
    if code:
        raise RuntimeError(f"{problem} (CUDA error {code})")
