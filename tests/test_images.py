"""Every way a picture comes in, everything that can be wrong with it, and that nothing but ImageError comes out."""

from __future__ import annotations

import base64
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from modelscope_cnclip import images
from modelscope_cnclip.images import ImageError, open_image

from .conftest import assert_refused, assert_shows
from .loopback_site import Site, closed_port

HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
SVG = b'\xef\xbb\xbf<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


def directory_entry(path: Path) -> os.DirEntry[bytes]:
    with os.scandir(os.fsencode(path.parent)) as entries:
        return next(entry for entry in entries if entry.name == os.fsencode(path.name))


LOCAL: dict[str, Callable[[Path], Any]] = {
    "str": str,
    "Path": lambda path: path,
    "os.PathLike of bytes": directory_entry,
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "memoryview with gaps": lambda path: memoryview(bytes(b for byte in path.read_bytes() for b in (byte, 0)))[::2],
    "PIL, not loaded": Image.open,
    "PIL": lambda path: Image.open(path).convert("RGB"),
    "array HWC": lambda path: np.asarray(Image.open(path).convert("RGB")),
    "array, reversed strides": lambda path: np.asarray(Image.open(path).convert("RGB"))[::-1].copy()[::-1],
    "array HWC4": lambda path: np.asarray(Image.open(path).convert("RGBA")),
    "data URI": lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
}


@pytest.mark.parametrize("kind", LOCAL)
def test_every_way_in(kind: str, path: Path, pixels: np.ndarray) -> None:
    assert_shows(LOCAL[kind](path), pixels)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)])
def test_grey_arrays(shape: tuple[int, ...]) -> None:
    grey = np.arange(35, dtype=np.uint8).reshape(shape)
    image = open_image(grey)
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), grey.reshape(5, 7))


def test_the_mode_is_kept_and_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("P", (4, 3), i) for i in (1, 2)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    image = open_image(tmp_path / "x.gif")
    assert image.mode == "P"
    assert image.size == (4, 3)
    with Image.open(tmp_path / "x.gif") as first:
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(first.convert("RGB")))


@pytest.mark.parametrize("name", ["x.png", "x", "猫 1.jpg", "x.txt"])
def test_names_and_types_on_the_way_do_not_matter(name: str, data: bytes, pixels: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert_shows(tmp_path / name, pixels)


def test_http(site: Site, data: bytes, pixels: np.ndarray) -> None:
    url = site.add("/a.png", data, Content_Type="image/png")
    assert_shows(url, pixels)
    assert_shows(site.add("/none", data), pixels)
    assert_shows(site.add("/chunked", [data[i : i + 100] for i in range(0, len(data), 100)]), pixels)
    assert_shows(site.add("/moved", b"", 302, Location=url), pixels)
    site.add("/%E7%8C%AB.png", data)
    assert_shows(f"{site.address}/猫.png", pixels)
    assert_shows(site.add("/zipped", zlib.compress(data), Content_Encoding="deflate"), pixels)


def png(width: int, height: int) -> bytes:
    """A PNG that says it is this large and holds one row."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 3 * min(width, 100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def noise(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(file, kind, **options)
    return file.getvalue()


BAD_FILES = {
    "empty": (b"", "empty file"),
    "truncated JPEG": (noise("JPEG")[:900], "damaged picture: image file is truncated"),
    "JPEG header only": (noise("JPEG")[:20], "not a picture"),
    "truncated PNG": (noise("PNG")[:900], "damaged picture: image file is truncated"),
    "text": (b"plain words\n", r"not a picture (it is text that starts with 'plain words\n')"),
    "HTML": (HTML, "not a picture (it is HTML, XML or SVG)"),
    "SVG": (SVG, "not a picture (it is HTML, XML or SVG)"),
    "random bytes": (b"\x00\x01\x02\xff" * 30, "not a picture (it starts with 00 01 02 ff"),
    "nothing to see": (png(0, 5), "not a picture"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name: str, tmp_path: Path) -> None:
    content, says = BAD_FILES[name]
    file = tmp_path / "photo.jpg"
    file.write_bytes(content)
    assert_refused(file, f"{file}: {says}")
    assert_refused(str(file), f"{file}: {says}")


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_bytes(name: str) -> None:
    content, says = BAD_FILES[name]
    assert_refused(content, f"<{len(content)} bytes>: {says.removesuffix(' file')}")


def test_pictures_without_pixels() -> None:
    assert_refused(Image.new("RGB", (0, 5)), "<PIL RGB 0×5>", "nothing in it")
    assert_refused(np.zeros((0, 5, 3), np.uint8), "<array uint8 (0, 5, 3)>", "nothing in it")
    assert_refused(np.zeros((5, 0), np.uint8), "<array uint8 (5, 0)>", "nothing in it")


def test_a_bomb_is_refused_before_memory_is_taken(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take_memory(*_: object) -> None:
        raise AssertionError("memory for the pixels was asked for")

    bomb = png(60_000, 60_000)
    (tmp_path / "bomb.png").write_bytes(bomb)
    monkeypatch.setattr(Image.core, "new", take_memory)
    url = site.add("/bomb.png", bomb)
    for source, name in ((tmp_path / "bomb.png", tmp_path / "bomb.png"), (bomb, f"<{len(bomb)} bytes>"), (url, url)):
        assert_refused(source, f"{name}: ", "3600000000 pixels", "PIL.Image.MAX_IMAGE_PIXELS")
    assert_refused(png(1000, 1000), "memory for the pixels was asked for")  # what a picture that is let through does


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere.jpg", f"{tmp_path / 'nowhere.jpg'}: no such file")
    assert_refused(str(tmp_path), f"{tmp_path}: is a folder, not a picture")
    (tmp_path / "x.png").write_bytes(HTML)
    assert_refused(tmp_path / "x.png" / "y.png", "y.png: Not a directory")
    assert_refused("a\0b.png", "a\0b.png: ", "null")
    assert_refused("x" * 5000, "xxx… (5000 characters): File name too long")


def test_the_reason_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / "x.png")
    assert str(caught.value) == f"{tmp_path / 'x.png'}: empty file"


@pytest.mark.parametrize("scheme", ["HTTP://host/a.png", "file:///a.png", "ftp://host/a.png", "s3://b/a.png"])
def test_other_schemes_are_named_as_they_came(scheme: str) -> None:
    assert_refused(scheme, f"{scheme}: no such file")


@pytest.mark.parametrize("source", [None, 5, 1.5, True, [1], {}, object()])
def test_what_is_no_picture_at_all(source: Any) -> None:
    assert_refused(source, f"<{type(source).__name__}>", "expected a path, URL, bytes, PIL image or uint8 array")


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.full((4, 4, 3), np.nan, np.float32), "<array float32 (4, 4, 3)>: arrays must be uint8 with values 0–255"),
        (np.zeros((4, 4, 3)), "<array float64 (4, 4, 3)>: arrays must be uint8 with values 0–255"),
        (np.zeros((4, 4), bool), "<array bool (4, 4)>: arrays must be uint8"),
        (np.zeros((4, 4), np.int64), "<array int64 (4, 4)>: arrays must be uint8"),
        (np.array([[None]]), "<array object (1, 1)>: arrays must be uint8"),
        (np.zeros((3, 8, 8), np.uint8), "(H, W), (H, W, 3) or (H, W, 4); it looks like (C, H, W): transpose it"),
        (np.zeros((8, 8, 2), np.uint8), "<array uint8 (8, 8, 2)>: arrays must be"),
        (np.zeros((2, 8, 8, 3), np.uint8), "<array uint8 (2, 8, 8, 3)>: arrays must be"),
        (np.zeros(8, np.uint8), "<array uint8 (8,)>: arrays must be"),
        (np.array(8, np.uint8), "<array uint8 ()>: arrays must be"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_picture(array: np.ndarray, says: str) -> None:
    assert_refused(array, says)
    with pytest.raises(ImageError) as caught:
        open_image(array)
    assert ("transpose" in str(caught.value)) == (array.shape == (3, 8, 8))
    assert ("it holds NaN" in str(caught.value)) == (array.dtype == np.float32)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("data:image/png,abc", "only data URIs of the form"),
        ("data:image/png;base64", "only data URIs of the form"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,A", "base64"),
        ("data:image/png;base64,!!!!", "base64"),
        ("data:image/png;base64,图", "ASCII"),
        ("data:text/html;base64," + base64.b64encode(HTML).decode(), "not a picture (it is HTML"),
    ],
)
def test_bad_data_uris(uri: str, says: str) -> None:
    assert_refused(uri, f"{uri[:60]}", says)


def test_a_long_data_uri_is_named_briefly(data: bytes) -> None:
    uri = "data:image/png;base64," + base64.b64encode(data[:-1000]).decode()
    with pytest.raises(ImageError, match=rf"data:image/png;base64,.*… \({len(uri)} characters\): damaged") as caught:
        open_image(uri)
    assert len(str(caught.value)) < 300


def test_urls_that_give_no_picture(site: Site, data: bytes) -> None:
    cases = {
        site.add("/gone.jpg", b"", 404): "the server answered 404 Not Found",
        site.add("/down.jpg", HTML, 503): "the server answered 503",
        site.add("/page", HTML, Content_Type="text/html; charset=utf-8"): "sent a web page (text/html; charset=utf-8)",
        site.add("/page.jpg", HTML, Content_Type="image/jpeg"): "not a picture (it is HTML, XML or SVG)",
        site.add("/svg", SVG, Content_Type="image/svg+xml"): "not a picture (it is HTML, XML or SVG)",
        site.add("/empty.jpg", b""): "the server sent nothing",
        site.add("/short.jpg", data[:500], Content_Length=str(len(data))): "500 bytes read",
        site.add("/loop.jpg", b"", 302, Location="/loop.jpg"): "redirects",
        site.add("/away.jpg", b"", 302, Location="file:///etc/passwd"): "No connection adapters",
        site.add("/zip.jpg", data, Content_Encoding="gzip"): "decompressing",
    }
    for url, says in cases.items():
        assert_refused(url, f"{url}: ", says)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://", "No host supplied"),
        ("http://*/a.png", "invalid label"),
        (f"http://{'a' * 70}.com/a.png", "too long"),
        ("http://\ud800/a.png", "not a valid IDNA label"),
        ("https://[/a.png", "not a valid host"),
    ],
)
def test_urls_that_are_none(address: str, says: str) -> None:
    assert_refused(address, f"{address}: can't be fetched", says)


def test_urls_that_cannot_be_reached(site: Site) -> None:
    url = f"http://127.0.0.1:{closed_port()}/a.png"
    assert_refused(url, f"{url}: can't be fetched", "Connection refused")


def test_urls_that_never_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 2**20)
    zeros = bytes(2**16)
    url = site.add("/endless.png", iter(lambda: zeros, None))
    assert_refused(url, f"{url}: larger than 1 MiB")


@pytest.mark.parametrize("address", ["{site}/a.png", "oss://photos/a.png"])
def test_the_limit_is_exact(
    address: str, bucket: Site, data: bytes, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.add("/a.png", data)
    bucket.add("/photos/a.png", data)
    monkeypatch.setattr(images, "MAX_BYTES", len(data))
    assert_shows(address.format(site=bucket.address), pixels)
    monkeypatch.setattr(images, "MAX_BYTES", len(data) - 1)
    assert_refused(address.format(site=bucket.address), "a.png: larger than")


def test_damaged_avif_is_told_like_any_other() -> None:
    """Its reader raises RuntimeError."""
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    head, mdat, body = noise("AVIF").partition(b"mdat")
    assert_refused(head + mdat + bytes(len(body)), "Failed to decode")


def samples() -> dict[str, bytes]:
    picture = Image.effect_noise((24, 24), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 6, "a description"
    options: dict[str, dict[str, Any]] = {
        "PNG": {"exif": exif}, "JPEG": {"exif": exif}, "GIF": {"save_all": True, "append_images": [picture.rotate(90)]},
        "WEBP": {"exif": exif}, "BMP": {}, "TIFF": {"compression": "tiff_deflate"},
    }  # fmt: skip
    if features.check("avif"):
        options["AVIF"] = {}
    out = {}
    for kind, values in options.items():
        file = io.BytesIO()
        picture.save(file, kind, **values)
        out[kind] = file.getvalue()
    return out


SAMPLES = samples()
BYTE_FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=12)


def opens_or_refuses(data: bytes, exif: bool) -> None:
    with patch.object(Image, "MAX_IMAGE_PIXELS", 100_000), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert 0 not in open_image(data, exif=exif).size
        except ImageError:
            with pytest.raises(ImageError, match=rf"^<{len(data)} bytes>: "):
                open_image(data, exif=exif)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300), exif=st.booleans())
def test_any_bytes_open_or_are_refused(data: bytes, exif: bool) -> None:
    opens_or_refuses(data, exif)


@pytest.mark.parametrize("kind", SAMPLES)
@settings(max_examples=300, deadline=None)
@given(flips=BYTE_FLIPS, start=st.booleans(), keep=st.floats(0, 1), exif=st.booleans())
def test_damaged_files_open_or_are_refused(
    kind: str, flips: list[tuple[float, int]], start: bool, keep: float, exif: bool
) -> None:
    """Bytes changed anywhere, or among the first 200 where the headers are, and perhaps the end cut off."""
    data = bytearray(SAMPLES[kind])
    for place, value in flips:
        data[int(place * (min(200, len(data)) if start else len(data)))] = value
    opens_or_refuses(bytes(data[: int(len(data) * keep)] if keep < 0.5 else data), exif)


def test_undamaged_samples_open() -> None:
    for kind, data in SAMPLES.items():
        assert open_image(data).format == kind


def test_postscript_is_not_handed_to_ghostscript() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert_refused(eps, "not a picture")
