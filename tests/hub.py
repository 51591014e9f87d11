"""A stand-in for the Hugging Face hub: folders as repositories, served by a thread. It answers
what huggingface_hub asks, and in the hub's words what it refuses."""

import hashlib
import importlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

COMMIT = "c" * 40
GATED = (
    "Access to model {} is restricted. You must have access to it and be authenticated to access"
    " it. Please log in."
)


def files(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}


def tree(folder):
    found = files(folder).items()
    return [{"type": "file", "path": k, "size": v.stat().st_size, "oid": k} for k, v in found]


def about(model, folder):
    siblings = [{"rfilename": name} for name in files(folder)]
    return {"id": model, "modelId": model, "sha": COMMIT, "siblings": siblings}


class Hub(BaseHTTPRequestHandler):
    """Knows the repositories of its server: {id: folder}. Those named gated/... are."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def refuse(self, status, code, message):
        self.answer(status, X_Error_Code=code, X_Error_Message=message)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        api = path.startswith("/api/models/")
        owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
        model = f"{owner}/{name}"
        folder = self.server.repositories.get(model)
        if folder is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if api:
            listed = json.dumps(tree(folder) if rest[:1] == ["tree"] else about(model, folder))
            return self.answer(200, listed.encode())
        if owner == "gated":
            return self.refuse(401, "GatedRepo", GATED.format(model))
        file = folder.joinpath(*rest[2:])  # after resolve/REVISION
        if not file.is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = file.read_bytes()
        self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    do_HEAD = do_GET


def read_again():
    """huggingface_hub reads its environment when it is imported; its own client keeps a part, and
    before version 1 what downloads keeps the rest."""
    constants = importlib.reload(huggingface_hub.constants)
    huggingface_hub.hf_api.api.endpoint = constants.ENDPOINT
    if hasattr(huggingface_hub.utils, "reset_sessions"):
        huggingface_hub.utils.reset_sessions()
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE = template


@contextmanager
def environment(**variables):
    """Inside, huggingface_hub has these variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, str(value))
        read_again()
        yield
    read_again()


@contextmanager
def serve(repositories, cache):
    """Inside, models come from a hub that has these {id: folder}, into the folder `cache`; what it
    was asked is listed in the server's `asked`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories = repositories
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        with environment(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=cache):
            yield server
    finally:
        server.shutdown()
        server.server_close()
