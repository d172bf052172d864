"""Decoding of pictures within limits: format, pixels, and whole to the last row.

Owns what is refused before a pixel is unpacked. Needs Pillow, of the extra [images]; it is imported when first used.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft_combo.data.pictures.sources import Picture, explain_failure
from peft_combo.errors import DataError, Fault, shorten

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 50_000_000
"""A file of some kB may unpack to gigabytes (a decompression bomb): no more than cameras make are unpacked."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class PictureError(DataError):
    """Bytes are no picture that is read here."""


def require_pillow() -> None:
    """Refuse to go on without Pillow.

    Raises:
        DataError: it is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise DataError(
            "Pictures need the package pillow, which is not installed: pip install 'peft-combo[images]'"
        ) from error


def decode_picture(content: bytes, edge: int | None = None) -> Image:
    """Unpack a picture to RGB; what is transparent is white, of several frames the first is taken.

    Args:
        edge: a JPEG that is much larger than so many pixels a side may be unpacked smaller, which is quicker.
    Raises:
        PictureError: it is none of `FORMATS`, too large, cut short or damaged.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is refused below, and of odd metadata
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > MOST_PIXELS:
                    raise PictureError(f"has {width:,} x {height:,} pixels, expected at most {MOST_PIXELS:,} in all")
                if edge is not None:
                    opened.draft("RGB", (2 * edge, 2 * edge))
                opened.load()
                image = ImageOps.exif_transpose(opened)
                if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                    layer = image.convert("RGBA")
                    image = Image.new("RGBA", layer.size, "white")
                    image.alpha_composite(layer)
                return image.convert("RGB")
    except UnidentifiedImageError:
        raise PictureError(f"is no picture; expected {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:  # Pillow's own bound, which is higher, refuses at the header
        raise PictureError(f"has far more than {MOST_PIXELS:,} pixels, expected at most so many") from None
    except PictureError:
        raise
    # What is damaged fails anywhere in Pillow's decoders: OSError, SyntaxError, struct.error, IndexError ...
    except Exception as error:
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 100)
        raise PictureError(f"is cut short or damaged ({reason})") from error


def find_picture_faults(pictures: Sequence[Picture | None], item_ids: Sequence[str]) -> list[Fault]:
    """Read and decode every picture, and return what is wrong with each.

    Raises:
        DataError: Pillow is not installed.
    """
    if any(picture is not None for picture in pictures):
        require_pillow()
    faults = []
    for picture, item_id in zip(pictures, item_ids, strict=True):
        if picture is None:
            continue
        try:
            decode_picture(picture.read())
        except (OSError, ValueError, PictureError) as error:
            where = f"image {shorten(picture.name)} of {shorten(item_id)}"
            faults.append(Fault(where, f"{explain_failure(error)}.", "Leave the cell empty where an item has none."))
    return faults
