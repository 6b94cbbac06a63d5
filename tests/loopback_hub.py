"""A ModelScope Hub on 127.0.0.1 for the genuine ``modelscope`` client to talk to.

Tests point the client at it with ``MODELSCOPE_ENDPOINT=hub.endpoint`` and an empty ``MODELSCOPE_CACHE``; nothing in
the client is replaced. The client reads both once per process, on first use: after setting them call
``modelscope_hub.config.set_default_config(None)``. The Hub serves the legacy ``/api/v1`` routes by which modelscope
1.40 / modelscope-hub 0.5 look up, list, download and push models. Every repository is readable by all, has the one
revision ``master`` and is held in memory, so keep models small; tokens are not checked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

REVISION = "master"
VISIBILITY_PUBLIC = 5
LFS_SUFFIXES = (".bin", ".onnx", ".pt", ".pth", ".safetensors")
LFS_THRESHOLD = 64 * 1024  # the client's default MODELSCOPE_UPLOAD_LFS_FORCE_THRESHOLD
MODEL_EXISTS = 10010101001  # business code which the client maps to AlreadyExistsError
NOT_FOUND = 10010200001  # business code of a 404, as users of the real Hub report it


@dataclass(frozen=True)
class Request:
    """One request as received: ``path`` without its query, ``headers`` looked up in any letter case."""

    method: str
    path: str
    query: dict[str, str]
    headers: Message


class LoopbackHub:
    """Context manager running the server in a thread; the port is bound, and ``endpoint`` known, on construction."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.pushed: dict[str, dict[str, bytes]] = {}  # model id -> path in the repository -> content
        self.visibility: dict[str, int] = {}  # model id -> Visibility in the call which created it
        self._models: dict[str, dict[str, bytes]] = {}
        self._lfs_objects: dict[str, bytes] = {}  # by SHA-256
        self._cuts: dict[str, int] = {}
        self._corrupted: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the Hub down: from now on connections to ``endpoint`` are refused."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def add_model(self, model_id: str, folder: Path) -> None:
        """Serve the files under ``folder`` as they are now; call again after changing them."""
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        self._models[model_id] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def cut(self, file_name: str, after: int) -> None:
        """Close the connection after ``after`` body bytes of the next download of ``file_name``, once."""
        self._cuts[file_name] = after

    def corrupt(self, file_name: str) -> None:
        """Flip one byte in every download of ``file_name``; the listing keeps the true Sha256."""
        self._corrupted.add(file_name)


class _Handler(BaseHTTPRequestHandler):
    # The inherited HTTP/1.0 closes each connection after its response, so that no pooled connection outlives stop().
    hub: LoopbackHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), dict(parse_qsl(url.query))
        self.hub.requests.append(Request(self.command, path, self.query, self.headers))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                model_known = match.groupdict().get("model_id") in {None, *self.hub._models}
                if model_known and self.query.get("Revision", REVISION) == REVISION:
                    return action(self, **match.groupdict())
        self._not_found()

    do_GET = do_POST = do_PUT = _dispatch

    def _reply(self, data: Any, status: int = 200, **error: Any) -> None:
        outcome = error or {"Code": 200, "Data": data, "Message": "success"}
        content = json.dumps(outcome | {"RequestId": "loopback", "Success": not error}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _not_found(self) -> None:
        self._reply(None, 404, Code=NOT_FOUND, Message="获取模型版本失败，信息：record not found")

    def get_model(self, model_id: str) -> None:
        owner, name = model_id.split("/")
        self._reply({"Path": owner, "Name": name, "Visibility": self.hub.visibility.get(model_id, VISIBILITY_PUBLIC)})

    def list_revisions(self, model_id: str) -> None:
        self._reply({"RevisionMap": {"Branches": [{"Revision": REVISION}], "Tags": []}})

    def list_files(self, model_id: str) -> None:
        files = self.hub._models[model_id]
        folders = {str(folder) for name in files for folder in PurePosixPath(name).parents} - {"."}
        entries: list[dict[str, Any]] = [{"Path": folder, "Type": "tree", "Size": 0} for folder in sorted(folders)]
        for name, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            entries.append({"Path": name, "Type": "blob", "Size": len(content), "Sha256": sha256})
        root, recursive = PurePosixPath(self.query.get("Root", ".")), self.query.get("Recursive") == "True"
        parents = ((entry, PurePosixPath(entry["Path"]).parents) for entry in entries)
        self._reply({"Files": [entry for entry, above in parents if root in (above if recursive else above[:1])]})

    def download(self, model_id: str) -> None:
        name = self.query.get("FilePath", "")
        content = self.hub._models[model_id].get(name)
        if content is None:
            return self._not_found()
        size = len(content)
        # As modelscope-hub notes of the real Hub: only LFS objects honour Range and announce their SHA-256.
        is_lfs = name.endswith(LFS_SUFFIXES) or size > LFS_THRESHOLD
        resume = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if is_lfs else None
        start = int(resume[1]) if resume else 0
        self.send_response(206 if resume else 200)
        if resume:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if is_lfs:
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        if name in self.hub._corrupted:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.wfile.write(content[start : start + self.hub._cuts.pop(name, size)])

    def create_model(self) -> None:
        body = json.loads(self.body)
        model_id = f"{body['Path']}/{body['Name']}"
        if model_id in self.hub._models:
            # upload_folder always posts a create (public by default): it must not change an existing repository.
            return self._reply(None, 400, Code=MODEL_EXISTS, Message=f"{model_id} already exists")
        self.hub._models[model_id], self.hub.visibility[model_id] = {}, body["Visibility"]
        self._reply(body)

    def lfs_batch(self, model_id: str) -> None:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub._lfs_objects:  # without an upload action the client does not send it
                item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
        self._reply({"objects": objects})

    def put_lfs_object(self) -> None:
        self.hub._lfs_objects[hashlib.sha256(self.body).hexdigest()] = self.body
        self._reply({})

    def commit(self, model_id: str) -> None:
        for action in json.loads(self.body)["actions"]:
            lfs = action["type"] == "lfs"
            content = self.hub._lfs_objects[action["sha256"]] if lfs else base64.b64decode(action["content"])
            for files in (self.hub._models[model_id], self.hub.pushed.setdefault(model_id, {})):
                files[action["path"]] = content
        self._reply({"oid": hashlib.sha1(self.body).hexdigest()})


_MODEL = r"/api/v1/models/(?P<model_id>[^/]+/[^/]+)"
_REPO = r"/api/v1/repos/models/(?P<model_id>[^/]+/[^/]+)"
# /openapi/v1/models/{id} is left out: on its 404 the client asks /api/v1/models/{id}, as for models not indexed there.
_ROUTES = (
    ("GET", _MODEL, _Handler.get_model),
    ("GET", _MODEL + "/revisions", _Handler.list_revisions),
    ("GET", _MODEL + "/repo/files", _Handler.list_files),
    ("GET", _MODEL + "/repo", _Handler.download),
    ("POST", "/api/v1/models", _Handler.create_model),
    ("POST", _REPO + "/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/[0-9a-f]{64}", _Handler.put_lfs_object),
    ("POST", _REPO + "/commit/" + REVISION, _Handler.commit),
)
