"""How long the pruning itself takes on large models, and whether a latency that was asked for is met. Proofs are off: tests make them.

    python -m benchmarks.speed [--parts check,flap7b,sparsegpt7b,flap70b,sparsegpt70b,latency] [--seconds 360] [--json FILE]
    python -m benchmarks.speed --device cpu --parts latency         ONNX Runtime on the CPU
    python -m benchmarks.speed --device cpu --smoke                 everything, tiny

Llama-shaped networks with random weights in bfloat16, calibrated on random tokens. Those of 70B live nowhere: every weight is drawn when
it is read and forgotten after its last use, as if it came from a file; how many blocks were alive at once is counted. Stages on a GPU are
timed by events. `latency` asks for 70 % of the time of the network as it is, and measures the result again, in turns with it.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
import traceback
import weakref
import zlib
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

LENGTH, TARGET, BAND = 2048, 0.70, (0.85, 1.05)
SHAPES = {  # width, inner width, blocks, heads, heads of keys and values
    "7b": (4096, 11008, 32, 32, 32),
    "70b": (8192, 28672, 80, 64, 8),
    "tiny": (64, 160, 4, 4, 2),
}
SAMPLES = {"flap7b": 128, "sparsegpt7b": 128, "flap70b": 32, "sparsegpt70b": 32}
BLOCKS = 4  # of the 70B network that SparseGPT solves


class Stages:
    """Seconds spent inside some functions, by a name for each: on a GPU between events, so that nothing waits."""

    def __init__(self, device: str) -> None:
        self.cuda, self.spans = device.startswith("cuda"), {}  # type: bool, dict[str, list[tuple[Any, Any]]]

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def watching(self, functions: dict[str, list[tuple[Any, str]]]) -> Iterator[None]:
        """functions: stage -> (owner, attribute)."""
        before = [(owner, name, getattr(owner, name)) for pairs in functions.values() for owner, name in pairs]
        try:
            for stage, pairs in functions.items():
                for owner, name in pairs:
                    setattr(owner, name, self._timed(stage, getattr(owner, name)))
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                self.spans.setdefault(stage, []).append((start, self._now()))

        return call

    def seconds(self) -> dict[str, float]:
        if self.cuda:
            torch.cuda.synchronize()
            return {stage: sum(a.elapsed_time(b) for a, b in spans) / 1e3 for stage, spans in self.spans.items()}
        return {stage: sum(b - a for a, b in spans) for stage, spans in self.spans.items()}


class Drawn:
    """Weights that are drawn when they are read; counts the blocks of which any is alive."""

    def __init__(self, device: str, buffers: dict[str, Tensor]) -> None:
        self.device, self.buffers = torch.device(device), buffers
        self.alive: dict[str, int] = {}
        self.most, self.bytes = 0, 0

    def __call__(self, value: Any) -> Tensor:
        if value.name in self.buffers:
            return self.buffers[value.name].to(self.device)
        tensor = torch.empty(value.shape, dtype=value.dtype, device=self.device)
        if tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.02, generator=torch.Generator(self.device).manual_seed(zlib.crc32(value.name.encode())))
        self.bytes += tensor.nbytes
        block = re.search(r"layers\.(\d+)\.", value.name)
        if block:
            self.alive[block[1]] = self.alive.get(block[1], 0) + 1
            self.most = max(self.most, len(self.alive))
            weakref.finalize(tensor, self._gone, block[1])
        return tensor

    def _gone(self, block: str) -> None:
        self.alive[block] -= 1
        if not self.alive[block]:
            del self.alive[block]

    def shelf(self) -> MutableMapping[str, Tensor]:
        return {}


class Run:
    """Options, and a place for rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.smoke, self.json = options.device, options.smoke, options.json
        self.cuda = self.device.startswith("cuda")
        self.deadline = time.monotonic() + options.seconds
        self.length = 32 if self.smoke else LENGTH
        self.names, self.backends = ([x for x in given.split(",") if x] for given in (options.networks, options.backends))
        self.captured: dict[tuple[str, int], Any] = {}

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def row(self, part: str, **found: Any) -> None:
        row = {"part": part, "device": torch.cuda.get_device_name() if self.cuda else "cpu", **found}
        print(f"{part:14} " + "  ".join(f"{k} {_text(v)}" for k, v in found.items()), flush=True)
        if self.json:
            with open(self.json, "a") as file:
                file.write(json.dumps(row) + "\n")

    def config(self, shape: str) -> Any:
        from transformers import LlamaConfig

        width, inner, blocks, heads, kv = SHAPES["tiny" if self.smoke else shape]
        return LlamaConfig(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads, num_key_value_heads=kv,
            vocab_size=32000, use_cache=False, max_position_embeddings=4096, dtype=torch.bfloat16,
        )  # fmt: skip

    def data(self, part: str, batch: int) -> list[dict[str, Tensor]]:
        count = 4 if self.smoke else SAMPLES[part]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 32000, (count, self.length), generator=generator).to(self.device)
        return [{"input_ids": part} for part in ids.split(batch)]

    def llama(self, shape: str) -> nn.Module:
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(self.device):
                return LlamaForCausalLM(self.config(shape)).eval()
        finally:
            torch.set_default_dtype(before)

    def drawn(self, shape: str, batch: int) -> tuple[Any, float]:
        """The program of a network whose weights are drawn when read, and the seconds of its capture."""
        from transformers import LlamaForCausalLM
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        import graphprune as gp

        config, start = self.config(shape), time.perf_counter()
        if (shape, batch) not in self.captured:
            with torch.device("meta"):
                model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
            ids = torch.zeros(batch, self.length, dtype=torch.long, device="meta")
            self.captured[shape, batch] = gp.capture(model, {"input_ids": ids})
        program, seconds = self.captured[shape, batch], time.perf_counter() - start
        rotary = LlamaRotaryEmbedding(config)
        program.reader = Drawn(self.device, {f"model.rotary_emb.{name}": tensor for name, tensor in rotary.named_buffers()})
        return program, seconds

    @contextmanager
    def memory(self, found: dict[str, Any]) -> Iterator[None]:
        """Peak memory of the device, and all seconds."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            found["before_gb"] = torch.cuda.memory_allocated() / 1e9
        start = time.perf_counter()
        yield
        if self.cuda:
            torch.cuda.synchronize()
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["total_s"] = time.perf_counter() - start


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {_text(v)}" for k, v in value.items()) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def watched() -> dict[str, list[tuple[Any, str]]]:
    """What the stages of a plan are made of."""
    from graphprune import planning
    from graphprune.calibration import Gram, statistics
    from graphprune.repair import obs
    from graphprune.sparsity.patterns import Unstructured

    return {
        "statistics": [(statistics, "tapped")], "gram": [(Gram, "update")], "solve": [(obs, "sweep")], "masks": [(Unstructured, "keep")],
        "allocation": [(planning, "allocate")],
    }  # fmt: skip


# ---- parts


def check(run: Run) -> None:
    """Both recipes on a small network on this device, with proof, before anything is timed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import graphprune as gp

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97)
    model = LlamaForCausalLM(config).eval().to(run.device)
    data = [torch.randint(3, 97, (4, 32)).to(run.device) for _ in range(2)]
    flap = gp.compile(model, data[0], recipe="flap", pruning_ratio=0.3, calibration_data=data, verify="full", progress=False)
    sparse = gp.compile(model, data[0], recipe="sparsegpt", sparsity=0.5, calibration_data=data, verify=True, progress=False)
    zeros = 1 - float(torch.cat([mask.flatten() for mask in sparse.plan.masks.values()]).float().mean())
    narrow = gp.compile(model.to(torch.bfloat16), data[0], recipe="sparsegpt", sparsity=0.5, calibration_data=data, verify=False)
    same = [float((narrow.plan.masks[k] == v).float().mean()) for k, v in sparse.plan.masks.items()]
    assert flap.certificate and flap.certificate.passed, flap.certificate
    assert abs(zeros - 0.5) < 0.01 and min(same) > 0.8, (zeros, same)  # by chance half of the entries agree
    run.row("check", flap=str(flap.certificate), zeros=zeros, masks_in_bfloat16_agree=min(same))


def flap7b(run: Run) -> None:
    _compiled(run, "flap7b", recipe="flap", pruning_ratio=0.2)


def sparsegpt7b(run: Run) -> None:
    _compiled(run, "sparsegpt7b", recipe="sparsegpt", sparsity=0.5)


def _compiled(run: Run, part: str, **arguments: Any) -> None:
    import graphprune as gp

    model = run.llama("7b")
    data, found, stages = run.data(part, 1), {}, Stages(run.device)  # type: Any, dict[str, Any], Stages
    with run.memory(found), stages.watching(watched()):
        result = gp.compile(model, data[0], calibration_data=data, verify=False, progress=False, **arguments)
    seconds = {**result.report.seconds, **{f"plan/{k}": v for k, v in stages.seconds().items()}}
    params = result.report.after.params / result.report.before.params
    how = result.written.how if result.written is not None else "-"
    samples = sum(len(batch["input_ids"]) for batch in data)
    with torch.no_grad():
        finite = bool(torch.isfinite(result.module(**data[0]).logits).all())
    zeros = [(mask.numel() - int(mask.sum()), mask.numel()) for mask in result.plan.masks.values()]
    kept = {"zeros": sum(a for a, _ in zeros) / sum(b for _, b in zeros)} if zeros else {"params_kept": params}
    assert finite
    run.row(part, samples=samples, **found, **kept, write_back=how, seconds=seconds)


def flap70b(run: Run) -> None:
    """Statistics, scores and plan of all blocks; then every weight is cut, on the device."""
    import graphprune as gp
    from graphprune.surgery.cut import Cut

    batch = 2 if run.smoke else 4
    data, found, stages = run.data("flap70b", batch), {}, Stages(run.device)  # type: Any, dict[str, Any], Stages
    with run.memory(found), stages.watching(watched()):
        program, captured = run.drawn("70b", batch)
        start = time.perf_counter()
        program.analysis  # noqa: B018
        analysed = time.perf_counter() - start
        start = time.perf_counter()
        plan = gp.plan(program, recipe="flap", pruning_ratio=0.2, calibration_data=data)
        planned = time.perf_counter() - start
        cut, kept, dense = Cut(program.analysis, plan.resolve(program)), 0, 0
        reader: Any = program.reader
        start = time.perf_counter()
        for value in program.weights.values():
            tensor = reader(value)
            dense += tensor.numel()
            for axis, keep in cut.keeps(value).items():
                tensor = tensor.index_select(axis, torch.from_numpy(keep).to(tensor.device))
            kept += tensor.numel()
            del tensor
        if run.cuda:
            torch.cuda.synchronize()
        surgery = time.perf_counter() - start
    seconds = {"capture": captured, "analysis": analysed, "plan": planned, "surgery": surgery}
    seconds |= {f"plan/{k}": v for k, v in stages.seconds().items()}
    blocks, most = len([g for g in plan.entries.values() if g.kind == "neuron"]), reader.most
    assert most <= 2, f"{most} blocks alive"
    run.row(
        "flap70b", samples=len(data) * batch, **found, params=dense / 1e9, params_kept=kept / dense, blocks_cut=blocks, blocks_alive=most,
        drawn_gb=reader.bytes / 1e9, seconds=seconds,
    )  # fmt: skip


def sparsegpt70b(run: Run) -> None:
    """The first blocks of the network, by the layer-wise driver."""
    from graphprune.recipes import RECIPES
    from graphprune.sparsity import solve_masks
    from graphprune.sparsity.patterns import Unstructured

    batch, blocks = (2, 2) if run.smoke else (4, BLOCKS)
    data, found, stages = run.data("sparsegpt70b", batch), {}, Stages(run.device)  # type: Any, dict[str, Any], Stages
    program, captured = run.drawn("70b", batch)
    score: Any = RECIPES["sparsegpt"].score
    with run.memory(found), stages.watching(watched()):
        targets = tuple(f"model.layers.{i}" for i in range(blocks))
        masks, weights = solve_masks(program, score, Unstructured(), 0.5, data=data, targets=targets)
    zeros = sum(int((~mask).sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    reader: Any = program.reader
    assert reader.most <= 2 and len(weights) == 7 * blocks, (reader.most, len(weights))
    run.row(
        "sparsegpt70b", samples=len(data) * batch, **found, blocks=blocks, s_per_block=found["total_s"] / blocks, zeros=zeros,
        blocks_alive=reader.most, seconds={"capture": captured, **stages.seconds()},
    )  # fmt: skip


def networks(run: Run) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Name -> the network (a module, or the path of a file) and its inputs, such that a call is bound by work and not by its launches."""

    def images(name: str, batch: int) -> Callable[[], tuple[nn.Module, Any]]:
        def make() -> tuple[nn.Module, Any]:
            import timm

            size = {"img_size": 64} if run.smoke and "vit" in name else {}
            model = timm.create_model(name, pretrained=False, **size)
            return model, torch.randn(2 if run.smoke else batch, 3, *(2 * [64 if run.smoke else 224]))

        return make

    def decoder() -> tuple[nn.Module, Any]:
        from transformers import LlamaConfig, LlamaForCausalLM

        width, inner, blocks = (64, 256, 2) if run.smoke else (2048, 8192, 8)
        config = LlamaConfig(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=16, num_key_value_heads=16,
            vocab_size=1000 if run.smoke else 32000, use_cache=False,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(torch.bfloat16), torch.randint(3, 1000, (2 if run.smoke else 8, 64 if run.smoke else 1024))

    def encoder() -> tuple[nn.Module, Any]:
        from transformers import BertConfig, BertModel

        config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1024, vocab_size=8000)
        return BertModel(config, add_pooling_layer=False), torch.randint(3, 8000, (4, 128))

    def recogniser() -> tuple[str, Any]:
        from benchmarks.onnx_files import fetch

        return str(fetch("ppocr4-rec")), torch.randn(1, 3, 48, 320)

    if run.cuda:
        return {
            "resnet50": images("resnet50", 64), "vit_small": images("vit_small_patch16_224", 64), "llama_8x2048": decoder,
        }  # fmt: skip
    return {
        "resnet18": images("resnet18", 2), "mobilenet_v2": images("mobilenetv2_100", 2), "ppocr4-rec": recogniser, "encoder_4x256": encoder,
    }  # fmt: skip


def onnx_call(model: Any, source: Any, device: str, inputs: Any) -> Callable[[], Any]:
    """A call by ONNX Runtime of a file, of a program that came from one, or of a module as `source` exports it."""
    from graphprune.backends.onnxruntime import OnnxRuntimeModel
    from graphprune.results import exported

    it = OnnxRuntimeModel(exported(model, source) if isinstance(model, nn.Module) else model, device=device)
    return lambda: it(inputs)


def module_call(module: nn.Module, compiled: bool, inputs: Any) -> Callable[[], Any]:
    """Compiled on a GPU: the replay of a CUDA graph. Of many candidates compiled in one process each call would else look for its own code."""
    it: Any = torch.compile(module.eval(), dynamic=False) if compiled else module.eval()

    def call() -> Any:
        with torch.no_grad():
            return it(inputs)

    if compiled and inputs.is_cuda:
        from graphprune.backends.timing import capture

        return capture([call]).replay
    return call


def latency(run: Run) -> None:
    """A budget of 70 % of the time of the network as it is; the result against it, measured again."""
    torch._dynamo.config.recompile_limit = 256  # one class, many candidates: beyond the limit they would run eagerly
    for name, make in networks(run).items():
        if run.names and name not in run.names:
            continue
        for backend in run.backends or (("torch", "torch.compile", "onnxruntime") if run.cuda else ("onnxruntime",)):
            if run.left < 20:
                print(f"{'latency':14} {name} {backend}: out of time", flush=True)
                continue
            try:
                torch.manual_seed(0)
                _met(run, name, backend, *make())
            except Exception:
                _failed(f"latency {name} {backend}")
            gc.collect()
            torch.compiler.reset()


def _met(run: Run, name: str, backend: str, model: Any, inputs: Any) -> None:
    """One network: by "torch" and "onnxruntime" as `compile` measures, by "torch.compile" with a measure of our own."""
    import graphprune as gp
    from graphprune.measure import interleaved
    from graphprune.trials import Trials, paired

    inputs = inputs.to(run.device)
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            if not parameter.any():  # a branch that starts at zero hides what is cut in it
                nn.init.normal_(parameter, std=0.02)
        model = model.eval().to(run.device)
    compiled, onnx = backend == "torch.compile", backend == "onnxruntime"

    def call(it: Any, source: Any) -> Callable[[], Any]:
        return onnx_call(it, source, run.device, inputs) if onnx else module_call(it, compiled, inputs)

    budget, start = {"latency_ms": f"{TARGET:.0%}"}, time.perf_counter()
    program = gp.capture(model, inputs)
    if compiled:
        dense = call(model, None)

        def measure(program: Any, pruned: Any, module: Any) -> tuple[float, float]:
            return paired([dense, call(module, None)], run.device, "", backend)

        plan = gp.plan(program, budget=budget, measure=Trials(program, measure))
        result = gp.apply(program, plan, verify=False)
    else:
        result = gp.compile(program, budget=budget, backend=backend, device=run.device if onnx else None, verify=False, progress=False)
    seconds = time.perf_counter() - start
    source, after = result.program.source, result.module if isinstance(model, nn.Module) else result.pruned
    with torch.no_grad():
        calls = {"dense": call(model, source), "result": call(after, source)}
        found = interleaved(calls, warmup=3, repeats=9 if run.smoke else 30, device=run.device)
    pairs = zip(found["result"].times, found["dense"].times)  # neighbours in time, so that other work slows both of them
    share = median(a / b for a, b in pairs) / TARGET
    ms = found["dense"].median_ms
    run.row(
        "latency", network=name, backend=backend, dense_ms=ms, target_ms=TARGET * ms, result_ms=found["result"].median_ms, of_target=share,
        met=BAND[0] <= share <= BAND[1], params_kept=result.report.after.params / result.report.before.params,
        write_back=result.written.how if result.written is not None else "-", search_s=seconds,
    )  # fmt: skip


PARTS: dict[str, Callable[[Run], None]] = {
    "check": check, "flap7b": flap7b, "sparsegpt7b": sparsegpt7b, "flap70b": flap70b, "sparsegpt70b": sparsegpt70b, "latency": latency,
}  # fmt: skip


def _failed(what: str) -> None:
    print(f"{what} FAILED\n" + "\n".join(traceback.format_exc().strip().splitlines()[-8:]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=360.0, help="no part starts later than this")
    parser.add_argument("--json", default="")
    parser.add_argument("--networks", default="", help="of the part latency, by name")
    parser.add_argument("--backends", default="", help="of the part latency: torch, torch.compile, onnxruntime")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    options = parser.parse_args()
    try:
        import tests.torchvision_ops  # noqa: F401  # where torchvision's CPU wheel lacks its operators
    except ImportError:
        pass
    run = Run(options)
    where = torch.cuda.get_device_name() if run.cuda else f"cpu, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {run.length} tokens a sample", flush=True)
    for name in options.parts.split(","):
        if run.left < 0:
            print(f"{name}: out of time", flush=True)
            continue
        try:
            PARTS[name](run)
        except Exception:
            _failed(name)
        gc.collect()
        if run.cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
