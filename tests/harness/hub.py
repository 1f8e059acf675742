"""A Hugging Face hub on this machine: repositories whose revisions are folders, and a note of what is asked of it.

It answers the few routes that huggingface_hub and vLLM take to find and to download a model. A process that calls `ask`
asks it, as one that was started with HF_ENDPOINT does: huggingface_hub reads the environment when it is imported.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import HfFileSystem, constants


class Hub:
    """What is served, and what was asked: `requests` are (method, path) in order, `tokens` those that were sent."""

    def __init__(self, revisions: dict[tuple[str, str], Path]):
        self.revisions = revisions
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.url = ""

    def commit(self, repository: str, revision: str) -> str:
        return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()

    def folder(self, repository: str, revision: str) -> Path | None:
        """A revision by its name or by its commit."""
        for (known, name), folder in self.revisions.items():
            if known == repository and revision in (name, self.commit(known, name)):
                return folder
        return None

    def name(self, repository: str, folder: Path) -> str:
        return next(name for (known, name), served in self.revisions.items() if (known, served) == (repository, folder))

    def downloads(self) -> list[str]:
        """Paths of the files that were fetched, not merely asked about."""
        return [path for method, path in self.requests if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.0"  # a connection that a client kept would lead to the hub of an earlier test

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if sent := self.headers.get("Authorization"):
            self.hub.tokens.add(sent.removeprefix("Bearer "))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.describe("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self.send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
        else:
            self.refuse("EntryNotFound")

    def describe(self, repository: str, rest: list[str]) -> None:
        revision = rest[1] if rest[:1] in (["revision"], ["tree"]) else "main"
        folder = self.hub.folder(repository, revision)
        if folder is None:
            return self.refuse("RevisionNotFound")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [str(file.relative_to(folder)) for file in files]
        if rest[:1] == ["tree"]:
            entries = zip(files, names, strict=True)
            return self.send_json(
                [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": etag(file)}
                    for file, name in entries
                ]
            )
        commit = self.hub.commit(repository, self.hub.name(repository, folder))
        siblings = [{"rfilename": name} for name in names]
        return self.send_json({"id": repository, "sha": commit, "siblings": siblings, "tags": [], "private": False})

    def send_file(self, repository: str, revision: str, name: str, body: bool) -> None:
        folder = self.hub.folder(repository, revision)
        if folder is None:
            return self.refuse("RevisionNotFound")
        file = folder / name
        if not file.is_file():
            return self.refuse("EntryNotFound")
        commit = self.hub.commit(repository, self.hub.name(repository, folder))
        self.send(200, file.read_bytes(), body, {"X-Repo-Commit": commit, "ETag": f'"{etag(file)}"'})

    def send_json(self, answer: object) -> None:
        self.send(200, json.dumps(answer).encode(), True, {"Content-Type": "application/json"})

    def refuse(self, code: str) -> None:
        self.send(404, b"", False, {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `requests` has them."""


def etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def ask(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process ask `hub` and nobody else, with an empty cache: what HF_ENDPOINT and HF_HUB_CACHE set."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
    # vLLM's is kept by fsspec with the endpoint that it was made with.
    HfFileSystem.clear_instance_cache()


@contextmanager
def hub_of(revisions: dict[tuple[str, str], Path]) -> Iterator[Hub]:
    """A hub with one folder for each (repository, revision), on a free port of this machine."""
    hub = Hub(revisions)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
