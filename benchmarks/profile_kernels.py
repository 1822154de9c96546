"""What bounds a kernel: hardware counters of one product with cold caches, at the tile that is fastest.

    ncu --profile-from-start off --clock-control none --csv --metrics $(python3 -m benchmarks.profile_kernels --metrics) \\
        python3 -m benchmarks.profile_kernels two_four 4096x14336 32 [--sparsity 0.5]

`dram` is the share of the peak of memory traffic, `sm` that of the busiest unit of the multiprocessors, `issue` the share of cycles in which
an instruction was issued, `alu` and `fma` the share of the peak of integer and of multiply-add instructions, `tensor` that of the matrix units.
"""

from __future__ import annotations

import argparse

METRICS = {
    "time": "gpu__time_duration.sum",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "alu": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "fma": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "lsu": "sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", nargs="?", default="two_four")
    parser.add_argument("shape", nargs="?", default="4096x14336")
    parser.add_argument("tokens", nargs="?", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--metrics", action="store_true", help="print the counters for ncu's command line")
    options = parser.parse_args()
    if options.metrics:
        print(",".join(METRICS.values()))
        return
    import torch

    from graphprune.backends.crossover import random_weight
    from graphprune.backends.gate import measure_kernel
    from graphprune.backends.products import FORMATS

    kernel = FORMATS[options.kernel]
    rows, columns = map(int, options.shape.split("x"))
    weight = random_weight(options.kernel, rows, columns, 1 - options.sparsity, torch.Generator("cuda").manual_seed(0))
    packed = kernel.pack(weight)
    found = measure_kernel(kernel, packed, weight, options.tokens)
    print(f"{options.kernel} {options.shape} {options.tokens} tokens: {found.sparse_us:.1f} us, dense {found.dense_us:.1f} us, '{found.config}'")
    x = torch.randn(options.tokens, columns, device="cuda").to(weight.dtype)
    torch.empty(2**28, dtype=torch.uint8, device="cuda").random_()  # nothing of the weight stays in the cache
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    kernel.linear(x, packed, config=found.config)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
