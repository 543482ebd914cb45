"""Pictures of any kind, decoded: upright, 8-bit RGB.

How colours become RGB: grey is repeated; CMYK is converted as Pillow does, without its colour profile; 16-bit grey is
scaled to 8 bits (65535 becomes 255); transparency is laid over white. Of an animation the first frame is taken.
"""

from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dist_contrastive.data.folders import IMAGE_SUFFIXES
from dist_contrastive.data.pairs import Member

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is tried on a file. Pillow knows more; some (EPS) start other programs."""


class BadImageError(Exception):
    """An image that can't be packed; the text is the reason."""


class NotAnImageError(BadImageError):
    """A file that neither its bytes nor its name call an image, such as a caption: it is passed over and counted."""


class TooManyPixelsError(BadImageError):
    """An image that is larger than is taken, by its header; nothing of it was decoded."""


def read_rgb(path: Path | Member) -> Image.Image:
    """The image in a file, or in a member of a tar: decoded in full, upright, 8-bit RGB.

    Raises `BadImageError` where it can't be decoded or its pixels have no known range, `NotAnImageError` where the file
    never was an image.
    """
    suffix = PurePosixPath(path.name).suffix.lower()
    no_image = BadImageError if suffix in IMAGE_SUFFIXES else NotAnImageError
    try:
        if (path.size if isinstance(path, Member) else path.stat().st_size) == 0:
            raise no_image("empty file")
        # From a file object: what is opened by name is mapped into memory, where Pillow 13 reads an uncompressed TIFF that
        # lies on its side with width and height exchanged.
        with path.open("rb") as file:
            return decode_rgb(file)
    except NotAnImageError as error:
        raise no_image(str(error)) from error
    except BadImageError:
        raise
    except FileNotFoundError as error:  # a link to nowhere
        raise no_image(f"unreadable: {error.strerror}") from error
    except Exception as error:
        raise BadImageError(_reason(error)) from error


def decode_rgb(file: IO[bytes], max_pixels: int | None = None) -> Image.Image:
    """The image in the bytes of `file`, as above; `NotAnImageError` where they are none, whatever they are called.

    `TooManyPixelsError` where there are more than `max_pixels`, by the header (None: Pillow's own limit).
    """
    try:
        with Image.open(file, formats=FORMATS) as opened:
            width, height = opened.size
            if max_pixels is not None and width * height > max_pixels:
                raise TooManyPixelsError(f"{width} x {height} pixels, more than {max_pixels}")
            return to_rgb(ImageOps.exif_transpose(opened), opened.format)
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise NotAnImageError(f"not an image ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels") from error
    except Exception as error:  # on damaged bytes Pillow's decoders raise whatever their parsing ran into
        raise BadImageError(_reason(error)) from error


def _reason(error: Exception) -> str:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return f"unreadable: {' '.join(reason.split())}"


def to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    """`image` as 8-bit RGB, as above; `file_format` is that of its file, which copies forget.

    Raises `BadImageError` where its range is unknown.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    # Pillow gives 16-bit grey as I;16, or as I where the format knows no wider integers.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        values[values == image.info.get("transparency")] = 65535  # the one value that a PNG may declare transparent
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImageError("pixels of 32 bits (or with a sign) have no fixed range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
