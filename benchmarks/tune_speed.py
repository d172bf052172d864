"""How many texts a second some ways of tuning get through, side by side, and what the processor could do at most.

    python benchmarks/tune_speed.py            # the embedded encoder over the demo catalogue, a few minutes
    python benchmarks/tune_speed.py --data FOLDER --top-layers 2 --threads 1

All train LoRA of rank 8 on the same texts of the same encoder, all but the first on the linear modules of the top
layers, as lora-fashion does. Each figure is texts encoded, with gradients and optimizer step, per second:

- textbook: every batch padded to 128 tokens, LoRA in every layer, as PEFT puts it where it is not told otherwise.
- pad-128: the same loop with LoRA in the top layers only; the whole encoder still runs forward.
- dynamic: padded to the longest text of the batch instead.
- sentence-transformers: its trainer with MultipleNegativesRankingLoss over pairs out of the same texts; left out where
  it is not installed.
- ours: `ItemEncoder`, as `peft-combo tune` uses it; the cache of the lower layers is filled before, and timed apart.

Rounds are interleaved, so a drift of the machine hits all alike; the median round counts, its spread is shown. The GEMM
bound is the time the matrix products of our step (frozen and low-rank, forward and backward, padding included, as done)
would take at the peak rate, which is measured in the same rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from _peer import load_sentence_transformer
from _smoke import add_smoke, make_tiny
from torch import nn

from peft_combo.encoder import methods
from peft_combo.encoder.architectures import find_layers, find_target_modules, set_dropout, set_training
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.tokens import chunk_by_length
from peft_combo.recipe.adapter import LoraAdapter
from peft_combo.recipe.files import load_recipe
from peft_combo.recipe.model import Recipe
from peft_combo.recommender import Workspace
from peft_combo.tuning.item_encoder import ItemEncoder

BATCH = 192  # distinct items in a batch of lora-fashion: 32 bundles and 64 extra negatives
LEFT_OUT = "sentence-transformers is not installed: its row is left out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of a dataset; default: the built-in demo")
    parser.add_argument("--top-layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_smoke(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    if options.smoke:
        with make_tiny() as tiny:
            compare(load_recipe("lora-fashion", tiny.changes, tiny.shop), options.top_layers, 1, batch=24, pad_to=16)
        return
    compare(load_recipe("lora-fashion", data=options.data), options.top_layers, options.rounds, BATCH, pad_to=128)


def compare(recipe: Recipe, top_layers: int, rounds: int, batch: int, pad_to: int) -> None:
    """Time all ways in turn and print the table; the first two pad every text to `pad_to` tokens."""
    space = Workspace.of(recipe)
    texts, backbone = list(dict.fromkeys(space.dataset.texts)), space.backbone
    adapter = LoraAdapter(rank=8, top_layers=top_layers)
    tokens = backbone.tokenize(texts).lengths
    print(
        f"{len(texts):,} texts of {tokens.mean():.1f} tokens on average, batches of {batch}, "
        f"{torch.get_num_threads()} threads"
    )

    ours, cached_in, flops = our_step(backbone, adapter, texts, batch)
    ways = {
        "textbook": plain_step(backbone, LoraAdapter(rank=8), texts, batch, pad_to),
        f"pad-{pad_to}": plain_step(backbone, adapter, texts, batch, pad_to),
        "dynamic": plain_step(backbone, adapter, texts, batch, None),
    }
    if importlib.util.find_spec("sentence_transformers"):
        ways["sentence-transformers"] = sentence_transformers_step(backbone, adapter, texts, batch)
    else:
        print(LEFT_OUT)
    ways["ours"] = ours
    rates: dict[str, list[float]] = {name: [] for name in (*ways, "peak")}
    for round_number in range(rounds + 1):
        for name, step in ways.items():
            count, seconds = step()
            if round_number:  # the first round warms up
                rates[name].append(count / seconds)
        rates["peak"].append(gemm_peak())

    print(f"\n{'':24}{'texts/s':>10}{'min to max':>18}{'ours is':>10}")
    middle = {name: statistics.median(values) for name, values in rates.items()}
    for name in ways:
        spread = f"{min(rates[name]):.0f} to {max(rates[name]):.0f}"
        print(f"{name:24}{middle[name]:10.1f}{spread:>18}{middle['ours'] / middle[name]:9.1f}x")
    print(f"\nlower layers of the whole catalogue, once: {cached_in:.1f} s")
    bound = middle["peak"] / (flops / batch)
    print(
        f"GEMM peak {middle['peak'] / 1e9:.0f} GFLOP/s; our step does {flops / batch / 1e6:.1f} MFLOP a text, "
        f"so at most {bound:.0f} texts/s: ours runs at {middle['ours'] / bound:.0%} of that bound"
    )


Step = Callable[[], tuple[int, float]]


def our_step(backbone: Backbone, adapter: LoraAdapter, texts: list[str], batch: int) -> tuple[Step, float, float]:
    """Return a timed step of ours, the seconds of filling the cache, and the floating point operations of a step."""
    attached = methods.attach(backbone.model, adapter, max_length=backbone.max_length, total_steps=100, seed=0)
    set_dropout(attached.inner, 0.0)
    clock = time.perf_counter()
    items = ItemEncoder(backbone, attached, texts)
    cached_in = time.perf_counter() - clock
    set_training(attached.inner, attached.first_layer, True)
    optimizer = torch.optim.AdamW(attached.trainable().values(), lr=1e-4)
    rows = np.random.default_rng(0).permutation(len(texts))[:batch]
    lengths = items.tokens.lengths[items.text_of[rows]]
    padded = sum(len(chunk) * int(lengths[chunk].max()) for chunk in chunk_by_length(lengths))

    def step() -> tuple[int, float]:
        clock = time.perf_counter()
        vectors = items.encode(items.encoder, rows)
        contrast(vectors).backward()
        optimizer.step()
        optimizer.zero_grad()
        return batch, time.perf_counter() - clock

    return step, cached_in, float(padded * flops_per_token(backbone, adapter))


def flops_per_token(backbone: Backbone, adapter: LoraAdapter) -> int:
    """Return the floating point operations of all matrix products of a step, per padded token.

    A linear module of I inputs and O outputs takes 2 I O forward and 2 I O for the gradient of its input; the gradients
    of A and B and the two projections they need take 2 r (I + O) each. The lowest adapted layer's input is cached, so
    nothing flows below its queries, keys and values. Attention's own products are left out, which favours the others.
    """
    layers = find_layers(backbone.model)
    top = adapter.top_layers or len(layers)
    linear = [(name, m) for name, m in layers[-1].named_modules() if isinstance(m, nn.Linear)]
    total = 0
    for place in range(top):
        for name, module in linear:
            size = module.in_features * module.out_features
            needs_input_gradient = place > 0 or not name.startswith("attention.self")
            total += (
                2 * size * (1 + needs_input_gradient)
                + 8 * adapter.rank * (module.in_features + module.out_features) // 2
            )
    return total


def plain_step(backbone: Backbone, adapter: LoraAdapter, texts: list[str], batch: int, pad_to: int | None) -> Step:
    attached = methods.attach(backbone.model, adapter, max_length=backbone.max_length, total_steps=100, seed=0)
    for module in attached.inner.modules():
        if hasattr(module, "lora_A"):
            module.__dict__.pop("forward", None)  # ours is laid over PEFT's own, which a textbook loop has
    optimizer = torch.optim.AdamW(attached.trainable().values(), lr=1e-4)
    # A whole padded batch takes many seconds; a third of it gives the same rate.
    count = batch // 3 if pad_to else batch
    rows = np.random.default_rng(0).permutation(len(texts))[:count]
    tokens = backbone.tokenize(texts)

    def step() -> tuple[int, float]:
        clock = time.perf_counter()
        ids, mask = tokens.pad(rows, backbone.pad_id, pad_to)
        vectors = backbone.pool(attached.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
        contrast(vectors).backward()
        optimizer.step()
        optimizer.zero_grad()
        return count, time.perf_counter() - clock

    return step


def sentence_transformers_step(backbone: Backbone, adapter: LoraAdapter, texts: list[str], batch: int) -> Step:
    """Return one short training of sentence-transformers with the same LoRA; its time is that of `train` alone."""
    import peft
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    folder = tempfile.TemporaryDirectory(prefix="tune-speed-")
    model = load_sentence_transformer(backbone, folder.name)
    targets = find_target_modules(backbone.model, "attention+ffn", adapter.top_layers)
    model.add_adapter(
        peft.LoraConfig(
            task_type="FEATURE_EXTRACTION", r=adapter.rank, lora_alpha=adapter.alpha, target_modules=targets
        )
    )
    rows = np.random.default_rng(0).permutation(len(texts))[: batch * 2]
    half = len(rows) // 2
    pairs = Dataset.from_dict({"a": [texts[r] for r in rows[:half]], "b": [texts[r] for r in rows[half:]]})

    def step() -> tuple[int, float]:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder.name, max_steps=2, per_device_train_batch_size=batch // 2, save_strategy="no",
            report_to=[], logging_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model)
        )
        clock = time.perf_counter()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            trainer.train()
        return 2 * batch, time.perf_counter() - clock

    return step


def contrast(vectors: torch.Tensor) -> torch.Tensor:
    """Return an in-batch contrastive loss over consecutive pairs."""
    half = len(vectors) // 2
    logits = vectors[:half] @ vectors[half : 2 * half].T / 0.05
    return nn.functional.cross_entropy(logits, torch.arange(half))


def gemm_peak() -> float:
    """Return the best rate, in FLOP/s, of a large float32 product as this library does it."""
    left, right = torch.randn(2048, 384), torch.randn(1536, 384)
    best = 0.0
    for _ in range(20):
        clock = time.perf_counter()
        nn.functional.linear(left, right)
        best = max(best, 2 * left.numel() * len(right) / (time.perf_counter() - clock))
    return best


if __name__ == "__main__":
    main()
