"""Real text as tokens: documentation, an essay and a dictionary that Debian packages, cut into tokens by a vocabulary trained on it.

    python -m benchmarks.text [folder]                  results/text/{train,test}.xz and vocabulary.json, once

The packages are fetched with `apt-get download` (a Debian or Ubuntu machine); what they hold is cleaned to lines of running text, each once.
One document in 64 is held out. A file holds 16-bit tokens, domain after domain, compressed; documents are shuffled by their hash.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import lzma
import re
import subprocess
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

# package -> files of it
PACKAGES: dict[str, str] = {
    "python3.11-doc": "*.html",
    "postgresql-doc-15": "*.html",
    "anarchism": "html/*.html",
    "libreoffice-help-en-us": "*.html",
    "perl-doc": "*.pod",
    "dict-gcide": "*.dict.dz",
}
VOCABULARY = 4096
HELD_OUT = 64  # one document in so many
PIECE = 100_000  # characters of one document at most
END = "<|end|>"

BLOCKS = {"p", "div", "li", "tr", "td", "th", "dt", "dd", "br", "pre", "h1", "h2", "h3", "h4", "h5", "section", "table", "ul", "ol", "dl"}
LEFT_OUT = {"script", "style", "head", "nav"}


class _Text(HTMLParser):
    """The running text of a page, a block a line."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipped = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.skipped += tag in LEFT_OUT
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipped -= tag in LEFT_OUT
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.parts.append(re.sub(r"\s+", " ", data))


def _html(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    return "".join(parser.parts)


def _pod(text: str) -> str:
    """Perl's documentation: paragraphs, without the indented code and the marks."""
    paragraphs = [p for p in text.split("\n\n") if not p.startswith((" ", "\t", "="))]
    return "\n".join(re.sub(r"\s+", " ", re.sub(r"[A-Z]<+ ?([^<>]*?) ?>+", r"\1", p)) for p in paragraphs)


def _dictionary(text: str) -> str:
    """An entry a line."""
    return "\n".join(re.sub(r"\s+", " ", entry) for entry in re.split(r"\n(?=\S)", text))


def documents(folder: Path) -> Iterator[str]:
    """Cleaned texts: lines of eight words and more that are mostly letters, each line once in all of them."""
    seen: set[bytes] = set()
    for package, pattern in PACKAGES.items():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            subprocess.run(["apt-get", "download", "-q", package], cwd=place, check=True, capture_output=True)
            subprocess.run(["dpkg", "-x", str(next(Path(place).glob("*.deb"))), f"{place}/unpacked"], check=True)
            for path in sorted(Path(place, "unpacked").rglob(pattern)):
                data = gzip.decompress(path.read_bytes()) if path.suffix == ".dz" else path.read_bytes()
                text = data.decode("utf-8", "replace")
                text = _html(text) if path.suffix == ".html" else _pod(text) if path.suffix == ".pod" else _dictionary(text)
                lines = []
                for line in (line.strip() for line in text.splitlines()):
                    digest = hashlib.blake2b(line.encode(), digest_size=8).digest()
                    letters = sum(c.isalpha() or c == " " for c in line)
                    if line.count(" ") >= 7 and letters > 0.8 * len(line) and digest not in seen:
                        seen.add(digest)
                        lines.append(line)
                text = "\n".join(lines)
                yield from (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results/text"))
    parser.add_argument("--most", type=int, default=20_000_000, help="training tokens")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = sorted((t for t in documents(options.folder) if len(t) > 500), key=lambda t: hashlib.sha256(t.encode()).digest())
    print(f"{len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} million characters", flush=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts[::4], trainer)
    tokenizer.save(str(options.folder / "vocabulary.json"))
    held = {t for t in texts if hashlib.sha256(t.encode()).digest()[-1] % HELD_OUT == 0}
    for name, part in (("test", [t for t in texts if t in held]), ("train", [t for t in texts if t not in held])):
        ids = [np.array([*encoded.ids, 0], np.uint16) for encoded in tokenizer.encode_batch(part)]
        flat = np.concatenate(ids)[: options.most]
        path = options.folder / f"{name}.xz"
        path.write_bytes(lzma.compress(flat.tobytes(), preset=4))
        characters = sum(map(len, part)) * len(flat) / sum(map(len, ids))
        print(f"{path}: {len(flat) / 1e6:.2f} million tokens of {characters / 1e6:.1f} million characters, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
