"""Made-up encoders and shops, tiny and real: what the tests and the benchmarks' smoke runs stand on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_combo.data.model import Dataset

# For each architecture: how to make a tiny, randomly built encoder of it. 32 wide, 4 heads, 3 layers, 200 words.
_SIZES: dict[str, dict[str, Any]] = {
    "bert": {}, "roberta": {"max_position_embeddings": 66}, "electra": {"embedding_size": 16},
    "mpnet": {"max_position_embeddings": 66}, "albert": {"embedding_size": 16},
    "distilbert": {"dim": 32, "n_heads": 4, "n_layers": 3, "hidden_dim": 48},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"},
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
}  # fmt: skip


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Let a tokenizer, whose first words are [PAD] [UNK] [CLS] [SEP] [MASK], frame texts, and save it as a model's."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip


def build_encoder(folder: Path, architecture: str = "bert", seed: int = 0, **changes: Any) -> Path:
    """Save a tiny encoder with a word tokenizer into `folder`, the way a model folder looks."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import AutoConfig, AutoModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(195))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save_tokenizer(folder, tokenizer)
    common = {"vocab_size": len(words), "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3,
              "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
    options = {**common, **_SIZES[architecture], **changes}
    if architecture == "distilbert":
        options = {k: v for k, v in options.items() if not k.startswith(("hidden_s", "num_", "intermediate"))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModel.from_config(AutoConfig.for_model(architecture, **options)).save_pretrained(folder)
    return folder


def build_vision(folder: Path, kind: str = "vit", seed: int = 0) -> Path:
    """Save a tiny vision encoder (vit, clip_vision_model or resnet) with its image processor: 32 pixels a side."""
    import json

    import torch
    from transformers import AutoConfig, AutoModel

    options: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    if kind == "resnet":
        options = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModel.from_config(AutoConfig.for_model(kind, **options)).save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def build_shop(folder: Path, above: str = "") -> Path:
    """Write 60 items in 6 styles and 90 bundles of 30 users into `folder`; items of one style go together.

    The style shows in one of two words a title has for it, so what goes together can be learned from text alone.

    Args:
        above: what stands before the style in an item's category path.
    """
    dice = random.Random(5)
    titles = [f"w{10 + number % 6 * 2 + number // 6 % 2} w{40 + number} w{120 + number % 7}" for number in range(60)]
    rows = "\n".join(f"i{number},{title},{above}Style {number % 3}" for number, title in enumerate(titles))
    (folder / "items.csv").write_text(f"item_id,title,category\n{rows}\n")
    members, meta = [], []
    for bundle in range(90):
        style = dice.randrange(6)
        chosen = dice.sample([number for number in range(60) if number % 6 == style], dice.choice((2, 3, 4)))
        members += [f"b{bundle},i{number}" for number in chosen]
        meta.append(f"b{bundle},u{bundle % 30}")
    (folder / "bundles.csv").write_text("bundle_id,item_id\n" + "\n".join(members) + "\n")
    (folder / "bundle_meta.csv").write_text("bundle_id,user_id\n" + "\n".join(meta) + "\n")
    return folder


def build_pictured_shop(folder: Path) -> Path:
    """Write 60 items in 6 styles and 90 bundles of 30 users; what goes together shows in pictures, and in no text.

    Every tenth item has no picture.
    """
    from peft_combo.data.pictures import DrawnPicture

    dice = random.Random(5)
    colours = ("Scarlet", "Lime", "Cobalt", "Butter", "Black", "Fuchsia")
    rows = []
    for number in range(60):
        image = "" if number % 10 == 9 else f"images/{number}.png"
        rows.append(f"i{number},w{40 + number},{image}")
        if image:
            (folder / "images").mkdir(exist_ok=True)
            (folder / image).write_bytes(DrawnPicture("top", colours[number % 6], "plain", number).read())
    (folder / "items.csv").write_text("item_id,title,image\n" + "\n".join(rows) + "\n")
    members, meta = [], []
    for bundle in range(90):
        style = dice.randrange(6)
        chosen = dice.sample([number for number in range(60) if number % 6 == style], dice.choice((2, 3, 4)))
        members += [f"b{bundle},i{number}" for number in chosen]
        meta.append(f"b{bundle},u{bundle % 30}")
    (folder / "bundles.csv").write_text("bundle_id,item_id\n" + "\n".join(members) + "\n")
    (folder / "bundle_meta.csv").write_text("bundle_id,user_id\n" + "\n".join(meta) + "\n")
    return folder


def build_priced_shop(folder: Path) -> Path:
    """Write 96 items with slots, prices, brands and stock in 6 styles, 120 bundles of 30 users, and what they bought.

    A bundle has an item each of 3 or 4 slots. Items of one style go together, as in `build_shop`; user n bought four
    items of style n mod 6.
    """
    dice = random.Random(7)
    slots = ("top", "bottom", "shoes", "bag")
    rows = []
    for number in range(96):
        style, slot = number % 6, number // 6 % 4
        title = f"w{10 + style * 2 + number // 24 % 2} w{30 + number} w{130 + slot}"
        place = f"Shop > {slots[slot].title()},{slots[slot]},{12 + 9 * (number % 11)}.50"
        rows.append(f"p{number},{title},{place},{'Acme' if number % 2 else 'Bold'},{number % 5}")
    (folder / "items.csv").write_text("item_id,title,category,slot,price,brand,stock\n" + "\n".join(rows) + "\n")
    bought = [
        f"u{user},p{item},{1_700_000_000 + 1000 * user + place}"
        for user in range(30)
        for place, item in enumerate(dice.sample([number for number in range(96) if number % 6 == user % 6], 4))
    ]
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(bought) + "\n")
    members, meta = [], []
    for bundle in range(120):
        style = dice.randrange(6)
        for slot in dice.sample(range(4), dice.choice((3, 4))):
            chosen = dice.choice([number for number in range(96) if number % 6 == style and number // 6 % 4 == slot])
            members.append(f"b{bundle},p{chosen}")
        meta.append(f"b{bundle},u{bundle % 30},w{10 + style * 2} look")
    (folder / "bundles.csv").write_text("bundle_id,item_id\n" + "\n".join(members) + "\n")
    (folder / "bundle_meta.csv").write_text("bundle_id,user_id,intent\n" + "\n".join(meta) + "\n")
    return folder


def add_sessions(dataset: Dataset) -> Dataset:
    """Give a dataset a session for each user: the items of all that user's bundles, mixed."""
    from dataclasses import replace

    import numpy as np

    from peft_combo.data.sessions import Sessions

    bundles = dataset.bundles
    owners = list(dict.fromkeys(bundles.groups))
    items, made = [], []
    for place, owner in enumerate(owners):
        rows = [row for row, group in enumerate(bundles.groups) if group == owner]
        together = list(dict.fromkeys(item for row in rows for item in bundles.items[row].tolist()))
        random.Random(place).shuffle(together)
        items.append(np.array(together, np.int32))
        made.append(tuple(bundles.bundle_ids[row] for row in rows))
    sessions = Sessions(tuple(f"s{owner}" for owner in owners), tuple(items), tuple(made), tuple(owners))
    return replace(dataset, sessions=sessions)
