"""Pictures of items: where their bytes lie, how they are decoded within limits, and how the demo draws its own.

Owns the border to Pillow for files; nothing is decoded while a catalogue is read. Knows nothing of encoders.
"""

from peft_combo.data.pictures.decoding import PictureError, decode_picture, find_picture_faults, require_pillow
from peft_combo.data.pictures.drawing import DrawnPicture
from peft_combo.data.pictures.sources import Picture, PictureBytes, PictureFile, find_path_problem, read_pictures

__all__ = [
    "DrawnPicture",
    "Picture",
    "PictureBytes",
    "PictureError",
    "PictureFile",
    "decode_picture",
    "find_path_problem",
    "find_picture_faults",
    "read_pictures",
    "require_pillow",
]
