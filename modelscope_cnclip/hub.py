"""A model named by Hub id, folder or ``.pt`` file -> local files.

Downloads go through ModelScope's own client, so its cache, endpoint (``MODELSCOPE_ENDPOINT``), tokens and checksums
hold. Only the files that a layout needs are fetched: the official repositories carry the same weights twice.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

logger = logging.getLogger("modelscope_cnclip")

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # ./x and ../x are paths
_SMALL = (".json", ".txt", ".md")


class HubError(OSError):
    """A model that can't be had. The text names it and says where was looked."""


def locate(model: str | Path, *, revision: str | None = None) -> Path:
    """The folder or file of a model; a Hub id is downloaded into ModelScope's cache, or found there when offline.

    Raises:
        HubError: no such file, folder or Hub id, or the Hub can't be reached and the cache hasn't got it.
    """
    try:
        path = Path(model).expanduser()
        if str(model) and path.exists():
            return path
    except (OSError, RuntimeError) as error:  # longer than a name can be, not readable, or ~someone who isn't there
        raise HubError(f"{model}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(model, str) or not _HUB_ID.fullmatch(model) or model.endswith(".pt"):
        raise HubError(f"{model}: no such file or folder, and no Hub id either (those look like ORG/NAME)")
    return _download(model, revision)


def _download(model_id: str, revision: str | None) -> Path:
    from modelscope.hub.api import HubApi
    from modelscope.hub.snapshot_download import snapshot_download
    from modelscope_hub.errors import CacheNotFound, NetworkError, NotExistError
    from modelscope_hub.errors import HubError as ClientError
    from requests import RequestException

    try:
        listing = HubApi().get_model_files(model_id, revision=revision, recursive=True)
    except NotExistError as error:
        raise HubError(f"{model_id}: no such model or revision on the Hub: {error}") from error
    except NetworkError as error:
        try:
            folder = Path(snapshot_download(model_id, revision=revision, local_files_only=True))
        except CacheNotFound:
            raise HubError(f"{model_id}: not in the cache, and the Hub can't be reached: {error}") from error
        logger.warning("%s: the Hub can't be reached; using the cached %s", model_id, folder)
        return folder
    except (ClientError, RequestException) as error:
        raise HubError(f"{model_id}: the Hub refused: {error}") from error
    wanted = _wanted([entry["Path"] for entry in listing])
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=wanted))
    except (ClientError, RequestException) as error:
        raise HubError(f"{model_id}: download failed: {error}") from error


def _wanted(names: list[str]) -> list[str]:
    """Of a repository's files, those that one layout needs."""
    top = [name for name in names if "/" not in name]
    small = [name for name in top if name.endswith(_SMALL)]
    shards = [name for name in top if re.search(r"-of-\d+\.(safetensors|bin)$", name)]
    for weights in ("model.safetensors", "pytorch_model.bin"):
        if weights in top:
            return [*small, weights]
        if f"{weights}.index.json" in top:
            return [*small, *(name for name in shards if name.endswith(Path(weights).suffix))]
    return [*small, *(name for name in top if name.endswith(".pt"))]
