"""``oss://`` through the genuine oss2 client against a server on loopback: signatures, limits, and what it answers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

from modelscope_cnclip import images, oss
from modelscope_cnclip.images import ImageError, open_image

from .conftest import assert_refused, assert_shows
from .loopback_site import Site, closed_port


def test_oss_without_keys(bucket: Site, data: bytes, pixels: np.ndarray) -> None:
    bucket.add("/photos/2024%2F%E7%8C%AB.png", data)
    assert_shows("oss://photos/2024/猫.png", pixels)
    assert bucket.seen[-1]["Authorization"] is None


def test_oss_in_chunks(bucket: Site) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 120, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "BMP")
    content = file.getvalue()  # larger than the pieces that oss2 reads
    bucket.add("/photos/noise.bmp", [content[i : i + 5000] for i in range(0, len(content), 5000)])
    assert_shows("oss://photos/noise.bmp", noise)


def test_oss_with_keys(bucket: Site, data: bytes, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys set after an anonymous request count, and the signature is that of OSS's documentation."""
    bucket.add("/photos/a.png", data)
    open_image("oss://photos/a.png")
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", "the-id")
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", "the-secret")
    monkeypatch.setenv("OSS_SESSION_TOKEN", "the-token")
    assert_shows("oss://photos/a.png", pixels)
    sent = bucket.seen[-1]
    signed = f"GET\n\n\n{sent['Date']}\nx-oss-security-token:the-token\n/photos/a.png"
    signature = base64.b64encode(hmac.new(b"the-secret", signed.encode(), hashlib.sha1).digest()).decode()
    assert sent["Authorization"] == f"OSS the-id:{signature}"
    monkeypatch.setenv("OSS_REGION", "cn-hangzhou")
    assert_shows("oss://photos/a.png", pixels)
    assert re.match(
        r"OSS4-HMAC-SHA256 Credential=the-id/\d{8}/cn-hangzhou/oss/aliyun_v4_request", bucket.seen[-1]["Authorization"]
    )
    assert not any("the-secret" in value for headers in bucket.seen for value in headers.values())


def oss_error(code: str, message: str) -> bytes:
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>\n  <Code>{code}</Code>\n  <Message>{message}</Message>\n'
        "  <RequestId>5C3D9175B6FC201293AD4890</RequestId>\n  <HostId>photos.oss-cn-hangzhou.aliyuncs.com</HostId>\n"
        "</Error>"
    ).encode()


@pytest.mark.parametrize(
    ("status", "code"), [(404, "NoSuchBucket"), (404, "NoSuchKey"), (403, "AccessDenied"), (403, "InvalidAccessKeyId")]
)
def test_what_oss_answers_is_told(status: int, code: str, bucket: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", "the-id")
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", "the-secret")
    bucket.add("/photos/a.png", oss_error(code, "…"), status, Content_Type="application/xml")
    assert_refused("oss://photos/a.png", "oss://photos/a.png", code, f"HTTP {status}")
    with pytest.raises(ImageError) as caught:
        open_image("oss://photos/a.png")
    assert "the-secret" not in str(caught.value)


def test_oss_answers_without_a_code(bucket: Site) -> None:
    bucket.add("/photos/a.png", b"", 503)
    assert_refused("oss://photos/a.png", "oss://photos/a.png: refused (HTTP 503)")


def test_oss_that_breaks_off(bucket: Site, data: bytes) -> None:
    bucket.add("/photos/a.png", data[:500], Content_Length=str(len(data)))
    assert_refused("oss://photos/a.png", "oss://photos/a.png", "500 bytes read")


@pytest.mark.parametrize("chunked", [False, True])
def test_oss_objects_that_are_too_large(chunked: bool, bucket: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 2**20)
    zeros = bytes(2**16)
    bucket.add("/photos/a.png", iter(lambda: zeros, None) if chunked else zeros, Content_Length=str(2**40))
    if chunked:
        del bucket.answers["/photos/a.png"][2]["Content-Length"]
    assert_refused("oss://photos/a.png", "oss://photos/a.png: larger than 1 MiB")


@pytest.mark.parametrize("address", ["oss://", "oss://photos", "oss://photos/", "oss:///a.png"])
def test_malformed_oss_addresses(address: str, bucket: Site) -> None:
    assert_refused(address, f"{address}: expected oss://BUCKET/KEY")


def test_oss_bucket_names_that_cannot_be(bucket: Site) -> None:
    assert_refused("oss://Photos_/a.png", "oss://Photos_/a.png", "bucket_name is invalid")


def test_oss_without_an_endpoint(bucket: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OSS_ENDPOINT")
    assert_refused("oss://photos/a.png", "oss://photos/a.png: set OSS_ENDPOINT")


@pytest.mark.parametrize("endpoint", ["http://", "http://127.0.0.1:port", "???"])
def test_oss_endpoints_that_are_none(endpoint: str, bucket: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSS_ENDPOINT", endpoint)
    assert_refused("oss://photos/a.png", "oss://photos/a.png", endpoint)


def test_oss_that_cannot_be_reached(bucket: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSS_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    assert_refused("oss://photos/a.png", "oss://photos/a.png", "Connection refused")


def test_oss_with_half_a_key(bucket: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", "the-id")
    assert_refused("oss://photos/a.png", "Secret access key should not be null or empty")


def test_oss_without_its_client(bucket: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "oss2", None)
    assert_refused("oss://photos/a.png", "oss://photos/a.png", "pip install 'modelscope-cnclip[oss]'")
    with pytest.raises(oss.OssError, match="needs oss2"):
        oss.read("oss://photos/a.png", max_bytes=1)
