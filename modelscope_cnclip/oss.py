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
    try:
        import oss2
    except ImportError:
        raise OssError(f"{address}: reading oss:// needs oss2: pip install 'modelscope-cnclip[oss]'") from None
    endpoint = os.environ.get(ENDPOINT)
    if not endpoint:
        raise OssError(f"{address}: set {ENDPOINT}, for example https://oss-cn-hangzhou.aliyuncs.com")
    try:
        answer = _bucket(name, endpoint, os.environ.get(REGION)).get_object(key)
        if (answer.content_length or 0) > max_bytes:
            raise OssError(f"{address}: {answer.content_length} bytes, over the limit of {max_bytes}")
        return answer.read()
    except oss2.exceptions.ServerError as error:
        raise OssError(f"{address}: {error.code or 'refused'} (HTTP {error.status})") from None
    except oss2.exceptions.OssError as error:
        raise OssError(f"{address}: {error.message or type(error).__name__}") from None


def split(address: str) -> tuple[str, str]:
    """``oss://bucket/some/key`` -> ("bucket", "some/key")."""
    bucket, _, key = address.removeprefix("oss://").partition("/")
    if not address.startswith("oss://") or not bucket or not key:
        raise OssError(f"{address}: expected oss://BUCKET/KEY")
    return bucket, key


@lru_cache(maxsize=32)
def _bucket(name: str, endpoint: str, region: str | None):
    """One client per bucket and endpoint: oss2 keeps its connections in it, and threads may share it."""
    import oss2

    if os.environ.get("OSS_ACCESS_KEY_ID"):
        provider = oss2.credentials.EnvironmentVariableCredentialsProvider()
        auth = oss2.ProviderAuthV4(provider) if region else oss2.ProviderAuth(provider)
    else:
        auth = oss2.AnonymousAuth()
    return oss2.Bucket(auth, endpoint, name, region=region, connect_timeout=10)
