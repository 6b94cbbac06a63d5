"""One picture from wherever it is: a path, a URL, an oss:// object, bytes, an array or a PIL image.

Every way in ends in :func:`open_image`, so limits and error texts are the same for the pipelines, the
command line, the data sets and the page. What comes out is a decoded ``PIL.Image`` in the picture's own
mode: the resize of CN-CLIP happens *before* the conversion to RGB, so nothing is converted here.
"""

from __future__ import annotations

import io
import os
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from . import oss

ImageSource: TypeAlias = str | os.PathLike | bytes | bytearray | memoryview | np.ndarray | Image.Image

MAX_BYTES = 100 * 2**20  # of one downloaded file
TIMEOUT = (10, 30)  # seconds: to connect, and between two chunks of an answer

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


class ImageError(ValueError):
    """A picture that can't be had. The text names the source and says what is wrong with it."""


def open_image(source: ImageSource, *, exif: bool = False) -> Image.Image:
    """Read and decode one picture.

    Args:
        source: a path, ``file`` object's bytes, ``http(s)://`` or ``oss://`` address, ``data:`` URI,
            ``PIL.Image``, or a uint8 array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
        exif: turn the picture as its EXIF orientation says. Upstream ignores the tag, and so do we unless
            asked: vectors of a photograph taken sideways differ between the two.

    Returns:
        The decoded picture, first frame of an animation, mode unchanged.

    Raises:
        ImageError: with the source and the reason. Pillow's limit on the number of pixels stays on.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _decode(source, describe(source), exif)
    name = describe(source)
    with _fetch(source) as data:
        try:
            image = Image.open(data, formats=_formats())
        except UnidentifiedImageError:
            raise ImageError(f"{name}: not a picture ({_looks_like(data)})") from None
        except Image.DecompressionBombError as error:
            raise ImageError(f"{name}: {error} Raise PIL.Image.MAX_IMAGE_PIXELS if you trust it.") from None
        except Exception as error:  # damaged files make Pillow's readers raise nearly anything
            raise ImageError(f"{name}: can't be read as a picture: {error or type(error).__name__}") from error
        return _decode(image, name, exif)


def describe(source: Any) -> str:
    """A short name of a source for messages: the path or address, else the type and size."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        text = text if isinstance(text, str) else os.fsdecode(text)
        return text if len(text) <= 200 else f"{text[:120]}… ({len(text)} characters)"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    if isinstance(source, np.ndarray):
        return f"<array {source.dtype} {source.shape}>"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"<PIL {source.mode} {source.width}×{source.height}>"
    return f"<{type(source).__name__}>"


def _decode(image: Image.Image, name: str, exif: bool) -> Image.Image:
    if 0 in image.size:
        raise ImageError(f"{name}: picture of {image.width}×{image.height} pixels has nothing in it")
    try:
        image.load()
        return ImageOps.exif_transpose(image) if exif else image
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # as above: AVIF raises RuntimeError, others AttributeError, KeyError …
        raise ImageError(f"{name}: damaged picture: {error or type(error).__name__}") from error


@cache
def _formats() -> tuple[str, ...]:
    """Everything that Pillow itself decodes. EPS it hands to Ghostscript, which runs the file's own program."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - {"EPS"}))


def is_address(text: str) -> bool:
    """Whether a str names something to fetch rather than a local file."""
    return text.startswith(("http://", "https://", "oss://", "data:"))


def _from_array(array: np.ndarray) -> Image.Image:
    name = describe(array)
    if array.dtype != np.uint8:
        hint = ", and it holds NaN" if array.dtype.kind == "f" and np.isnan(array).any() else ""
        raise ImageError(f"{name}: arrays must be uint8 with values 0–255{hint}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        hint = "; it looks like (C, H, W): transpose it" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ImageError(f"{name}: arrays must be (H, W), (H, W, 3) or (H, W, 4){hint}")
    if 0 in array.shape:
        raise ImageError(f"{name}: there is nothing in it")
    return Image.fromarray(array)


def _fetch(source: Any) -> io.BufferedIOBase:
    """An open, seekable binary file for everything that isn't decoded yet."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)  # BytesIO refuses a memoryview with gaps
        if not data:
            raise ImageError("<0 bytes>: empty")
        return io.BytesIO(data)
    if isinstance(source, str) and is_address(source):
        return io.BytesIO(_download(source))
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(
            f"{describe(source)}: expected a path, URL, bytes, PIL image or uint8 array, got {type(source).__name__}"
        )
    path, name = Path(os.fsdecode(source)), describe(source)
    try:
        folder, size = path.is_dir(), path.stat().st_size
        if not folder and size:
            return path.open("rb")
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    raise ImageError(f"{name}: is a folder, not a picture" if folder else f"{name}: empty file")


def _download(address: str) -> bytes:
    if address.startswith("data:"):
        return _data_uri(address)
    if address.startswith("oss://"):
        try:
            return oss.read(address, max_bytes=MAX_BYTES)
        except oss.OssError as error:
            raise ImageError(str(error)) from error
    import requests

    try:
        with requests.get(address, stream=True, timeout=TIMEOUT) as answer:
            if answer.status_code != 200:
                raise ImageError(f"{address}: the server answered {answer.status_code} {answer.reason}")
            kind = answer.headers.get("Content-Type", "")
            if kind.startswith("text/html"):
                raise ImageError(f"{address}: the server sent a web page ({kind}), not a picture")
            data = bytearray()
            for chunk in answer.iter_content(2**16):
                data += chunk
                if len(data) > MAX_BYTES:
                    raise ImageError(f"{address}: larger than {MAX_BYTES // 2**20} MiB")
    except ImageError:
        raise
    except (requests.RequestException, ValueError) as error:  # urllib3's LocationParseError comes through as it is
        raise ImageError(f"{address}: can't be fetched: {_first_cause(error)}") from error
    if not data:
        raise ImageError(f"{address}: the server sent nothing")
    return bytes(data)


def _data_uri(address: str) -> bytes:
    import base64

    head, comma, body = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ImageError(f"{describe(address)}: only data URIs of the form data:image/…;base64,… are read")
    try:
        data = base64.b64decode(body, validate=True)
    except ValueError as error:
        raise ImageError(f"{describe(address)}: {error}") from None
    if not data:
        raise ImageError(f"{describe(address)}: empty")
    return data


def _first_cause(error: BaseException) -> str:
    """requests wraps the reason three deep; people want the innermost sentence."""
    seen = error
    while True:
        inner = getattr(seen, "reason", None) or (seen.args[0] if seen.args else None)
        if not isinstance(inner, BaseException):
            break
        seen = inner
    return str(seen).split(": ", 1)[-1] or type(error).__name__


def _looks_like(data: io.BufferedIOBase) -> str:
    data.seek(0)
    head = data.read(64).removeprefix(b"\xef\xbb\xbf")
    if head.lstrip()[:1] == b"<":
        return "it is HTML, XML or SVG"
    start = head[:24].decode("latin-1")
    if start.isascii() and all(char.isprintable() or char.isspace() for char in start):
        return f"it is text that starts with {start!r}"
    return f"it starts with {head[:8].hex(' ')}"
