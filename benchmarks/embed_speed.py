"""How many texts a second become vectors: on the CPU, on a GPU in two precisions, beside sentence-transformers.

    python benchmarks/embed_speed.py                # 20,000 titles, the embedded encoder, a minute on two cores
    python benchmarks/embed_speed.py --texts 200000

The texts are titles of the demo catalogue, each with a number so that no two are equal. Every way encodes the same
texts in the same process, in interleaved rounds; the median round counts, its spread is shown, tokenization included.
`difference` is the largest coordinate's from float32 on the CPU. sentence-transformers reads the same weights from a
folder and is left out, with a line, where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _peer import load_sentence_transformer
from _smoke import add_smoke, make_tiny
from numpy.typing import NDArray

from peft_combo.data.sources import open_dataset
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.tokens import CHUNK_TOKENS, GPU_CHUNK_TOKENS
from peft_combo.recipe.files import load_recipe

Encode = Callable[[list[str]], NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    add_smoke(parser)
    options = parser.parse_args()
    if options.smoke:
        with make_tiny() as tiny:
            compare(str(tiny.folder / "encoder"), str(tiny.shop), 200, 2)
        return
    compare("embedded", None, options.texts, options.rounds)


def compare(model: str, data: str | None, count: int, rounds: int) -> None:
    """Print a line for each way."""
    titles = open_dataset(load_recipe("lora-fashion", (), data).data).catalog.texts("{title}")
    texts = [f"{titles[place % len(titles)]} {place // len(titles)}" for place in range(count)]
    here = Backbone.load(model, device="cpu")
    ways: dict[str, Encode] = {}
    for size in (CHUNK_TOKENS, 8192):
        ways[f"cpu, float32, {size} tokens at once"] = lambda texts, size=size: here.encode(  # type: ignore[misc]
            texts, chunk_tokens=size
        )
    if torch.cuda.is_available():
        there = Backbone.load(model, device="cuda")
        for size in (CHUNK_TOKENS, 8192, GPU_CHUNK_TOKENS, 4 * GPU_CHUNK_TOKENS):
            ways[f"gpu, float32, {size} tokens at once"] = lambda texts, size=size: there.encode(  # type: ignore[misc]
                texts, chunk_tokens=size
            )
        ways[f"gpu, bfloat16, {GPU_CHUNK_TOKENS} tokens at once"] = lambda texts: encode_in_bf16(there, texts)
        ways["gpu machine, tokenization alone"] = lambda texts: tokenize(there, texts)
    with tempfile.TemporaryDirectory() as folder:
        peer = load_peer(here, Path(folder))
        if peer is None:
            print("sentence-transformers is not installed: its row is left out")
        else:
            ways["sentence-transformers, batches of 256"] = peer
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        exact, away = here.encode(texts[:500]), {}
        for name, encode in ways.items():  # what is made once is made here
            found = encode(texts[:500])
            away[name] = float(np.abs(found - exact).max()) if found.shape == exact.shape else float("nan")
        for _ in range(rounds):
            for name, encode in ways.items():
                clock = time.perf_counter()
                encode(texts)
                seconds[name].append(time.perf_counter() - clock)
    print(f"{count:,} texts, {torch.get_num_threads()} threads")
    print(f"{'':46}{'texts/s':>10}{'spread':>8}{'difference':>12}")
    for name, taken in seconds.items():
        spread = (max(taken) - min(taken)) / statistics.median(taken)
        print(f"{name:46}{count / statistics.median(taken):10,.0f}{spread:8.0%}{away[name]:12.1e}")


def encode_in_bf16(backbone: Backbone, texts: list[str]) -> NDArray[np.float32]:
    with torch.autocast("cuda", torch.bfloat16):
        return backbone.encode(texts)


def tokenize(backbone: Backbone, texts: list[str]) -> NDArray[np.float32]:
    return np.zeros((len(backbone.tokenize(texts)), 0), np.float32)


def load_peer(backbone: Backbone, folder: Path) -> Encode | None:
    if importlib.util.find_spec("sentence_transformers") is None:
        return None
    peer = load_sentence_transformer(backbone, folder, None)
    return lambda texts: np.asarray(
        peer.encode(texts, batch_size=256, show_progress_bar=False, normalize_embeddings=True), np.float32
    )


if __name__ == "__main__":
    main()
