"""A hub on 127.0.0.1 for tests: the few endpoints that the `huggingface_hub` client asks, and a log of what it asked.

    GET  /api/models/<id>/revision/<revision>        the commit behind a branch, and the file names
    GET  /api/models/<id>/tree/<commit>              names and sizes
    HEAD /<id>/resolve/<commit>/<file>               ETag, size, commit
    GET  /<id>/resolve/<commit>/<file>               the bytes

Those of a data set are at /api/datasets/<id>/... and /datasets/<id>/... instead.
Files are served plainly: no redirect to a content network and no Xet header, so that the client uses HTTP alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


@dataclass(frozen=True)
class Repository:
    """Files by name; `refusal` is the status and X-Error-Code with which every file (not the listing) is refused."""

    files: Mapping[str, bytes]
    refusal: tuple[int, str] | None = None
    is_dataset: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(name.encode() + self.files[name] for name in sorted(self.files))).hexdigest()


@dataclass
class HubServer:
    """A context manager; `url` is for HF_ENDPOINT, `asked` holds "METHOD path" of every request so far."""

    repositories: Mapping[str, Repository]
    asked: list[str] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, format: str, *arguments: object) -> None:
                """Quiet: `asked` is the log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def files_asked(self, repository: str) -> set[str]:
        """The names of the files whose bytes were fetched."""
        found = (re.fullmatch(rf"GET (?:/datasets)?/{repository}/resolve/\w+/(.+)", line) for line in self.asked)
        return {match[1] for match in found if match}

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.asked.append(f"{request.command} {path}")
        kinds = "(api/models/|(?:api/)?datasets/)?"
        found = re.fullmatch(rf"/{kinds}([\w.-]+/[\w.-]+)/(revision|tree|resolve)/([\w.%-]+)(?:/(.+))?", path)
        repository = self.repositories.get(found[2]) if found else None
        if found is None or repository is None or repository.is_dataset != ("datasets" in (found[1] or "")):
            _refuse(request, 404, "RepoNotFound")
        elif found[4] not in ("main", "refs%2Fconvert%2Fparquet", repository.commit):
            _refuse(request, 404, "RevisionNotFound")
        elif found[3] == "revision":
            names = [{"rfilename": name} for name in repository.files]
            _send_json(request, {"id": found[2], "sha": repository.commit, "siblings": names})
        elif found[3] == "tree":
            _send_json(request, [_listed(name, content) for name, content in repository.files.items()])
        elif repository.refusal is not None:
            _refuse(request, *repository.refusal)
        elif found[5] not in repository.files:
            _refuse(request, 404, "EntryNotFound")
        else:
            _send_file(request, repository.files[found[5]], repository.commit)


def _listed(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _send_json(request: BaseHTTPRequestHandler, content: object) -> None:
    _send(request, 200, json.dumps(content).encode(), {"Content-Type": "application/json"})


def _send_file(request: BaseHTTPRequestHandler, content: bytes, commit: str) -> None:
    _send(request, 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit})


def _refuse(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
    _send(request, status, b"", {"X-Error-Code": code, "X-Error-Message": f"refused: {code}"})


def _send(request: BaseHTTPRequestHandler, status: int, content: bytes, headers: Mapping[str, str]) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(content)
