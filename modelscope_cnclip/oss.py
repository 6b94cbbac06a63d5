"""Objects in Alibaba Cloud OSS, addressed as ``oss://bucket/key``.

Credentials come from the environment, under the names oss2's own providers use: ``OSS_ACCESS_KEY_ID``,
``OSS_ACCESS_KEY_SECRET``, ``OSS_SESSION_TOKEN`` (for STS), with ``OSS_ENDPOINT``
(``https://oss-cn-hangzhou.aliyuncs.com``) and, for V4 signatures, ``OSS_REGION`` (``cn-hangzhou``).
Without keys the request is anonymous, as public buckets allow. Nothing here logs a credential.
"""

from __future__ import annotations

import os
from functools import lru_cache

ENDPOINT, REGION = "OSS_ENDPOINT", "OSS_REGION"


class OssError(OSError):
    """An object that can't be had. The text names the address and what the service answered."""


def read(address: str, *, max_bytes: int) -> bytes:
    """The whole object at ``oss://bucket/key``.

    Raises:
        OssError: the address is malformed, no endpoint is set, oss2 is missing, the object is larger than
            ``max_bytes``, or the service refused; the service's own code (NoSuchKey, AccessDenied …) is in the text.
    """
    name, key = split(address)
    import requests

    try:
        import oss2
    except ImportError:
        raise OssError(f"{address}: reading oss:// needs oss2: pip install 'modelscope-cnclip[oss]'") from None
    endpoint = os.environ.get(ENDPOINT)
    if not endpoint:
        raise OssError(f"{address}: set {ENDPOINT}, for example https://oss-cn-hangzhou.aliyuncs.com")
    keys = bool(os.environ.get("OSS_ACCESS_KEY_ID"))
    data = bytearray()
    try:
        with _bucket(name, endpoint, os.environ.get(REGION), keys).get_object(key) as answer:
            for piece in answer:
                data += piece
                if max(len(data), answer.content_length or 0) > max_bytes:  # a chunked answer doesn't tell its length
                    raise OssError(f"{address}: larger than {max_bytes / 2**20:g} MiB")
    except oss2.exceptions.ServerError as error:
        raise OssError(f"{address}: {error.code or 'refused'} (HTTP {error.status})") from None
    except oss2.exceptions.OssError as error:
        raise OssError(f"{address}: {error.message or error.body}") from None
    except (requests.RequestException, TypeError, ValueError) as error:
        # A connection that breaks off, an endpoint that is no address: oss2 lets these through as they are.
        raise OssError(f"{address}: {error} ({ENDPOINT} is {endpoint})") from None
    return bytes(data)


def split(address: str) -> tuple[str, str]:
    """``oss://bucket/some/key`` -> ("bucket", "some/key")."""
    bucket, _, key = address.removeprefix("oss://").partition("/")
    if not address.startswith("oss://") or not bucket or not key:
        raise OssError(f"{address}: expected oss://BUCKET/KEY")
    return bucket, key


@lru_cache(maxsize=32)
def _bucket(name: str, endpoint: str, region: str | None, keys: bool):
    """One client per bucket and endpoint: oss2 keeps its connections in it, and threads may share it."""
    import oss2

    if keys:
        provider = oss2.credentials.EnvironmentVariableCredentialsProvider()
        auth = oss2.ProviderAuthV4(provider) if region else oss2.ProviderAuth(provider)
    else:
        auth = oss2.AnonymousAuth()
    # With its CRC (which nothing would compare) oss2 2.19 loses all but the first 8 KiB of a chunked answer.
    return oss2.Bucket(auth, endpoint, name, region=region, connect_timeout=10, enable_crc=False)
