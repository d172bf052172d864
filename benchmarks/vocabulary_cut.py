"""What a vocabulary cut to a catalogue saves: parameters, memory, time to load and encode, and how exact vectors are.

    python benchmarks/vocabulary_cut.py [--smoke]

Each form is loaded in a process of its own on one thread; the catalogue is the Chinese demo. Ratios of one run count,
for the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np


def measure(vocabulary: str, model: str, texts: int) -> dict[str, Any]:
    """Load, encode and look at the memory of this process, in MiB."""
    import psutil

    from peft_combo.data.readers.demo import demo_dataset
    from peft_combo.encoder.backbone import Backbone
    from peft_combo.encoder.vocabulary import cut_backbone

    titles = demo_dataset("demo-zh").catalog.titles[:texts]
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    backbone = Backbone.load(model, max_length=48, device="cpu")
    if vocabulary == "catalog":
        backbone = cut_backbone(backbone, titles)
    loaded = time.perf_counter() - start
    start = time.perf_counter()
    vectors = backbone.encode(titles)
    encoded = time.perf_counter() - start
    return {
        "parameters": sum(one.numel() for one in backbone.model.parameters()),
        "tokens": backbone.model.get_input_embeddings().num_embeddings,  # type: ignore[operator]
        "load_s": loaded,
        "texts_per_s": len(titles) / encoded,
        "memory_mib": (psutil.Process().memory_info().rss - before) / 2**20,
        "vectors": vectors.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="A few texts and the embedded encoder.")
    parser.add_argument("--only", choices=("full", "catalog"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    model, texts = ("embedded", 20) if options.smoke else ("embedded-multilingual", 1000)
    if options.only:
        print(json.dumps(measure(options.only, model, texts)))
        return
    found: dict[str, dict[str, Any]] = {}
    for name in ("full", "catalog"):
        if options.smoke:  # one process is quicker than three
            found[name] = measure(name, model, texts)
            continue
        command = [sys.executable, __file__, "--only", name]
        found[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    vectors = {name: np.array(one.pop("vectors"), np.float32) for name, one in found.items()}
    for name, one in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:,.1f}" for key, value in one.items()))
    print("largest difference of a vector's value:", float(np.abs(vectors["full"] - vectors["catalog"]).max()))


if __name__ == "__main__":
    main()
