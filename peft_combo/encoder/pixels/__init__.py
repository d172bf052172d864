"""Vision encoders: pictures in, vectors out, frozen or under the adapter that a head brings.

Owns loading, preparing and encoding of pictures. Imported only where a recipe names an image model. Knows nothing of
items.
"""

from peft_combo.encoder.pixels.encoder import AdaptedPictures, PictureEncoder

__all__ = ["AdaptedPictures", "PictureEncoder"]
