"""A Hub of one model on this machine, for the real huggingface_hub client: what a snapshot download asks for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "1" * 40


@contextlib.contextmanager
def serve(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address for HF_ENDPOINT, and the list of files that were downloaded, which grows."""
    given: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{name}/tree/"):
                tree = [
                    {
                        "type": "file",
                        "path": file.name,
                        "size": file.stat().st_size,
                        "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                    }
                    for file in sorted(folder.iterdir())
                ]
                self.send(json.dumps(tree).encode(), "application/json", body)
            elif path.startswith(f"/api/models/{name}"):
                files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                self.send(json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode(), "application/json", body)
            elif path.startswith(f"/{name}/resolve/") and (folder / Path(path).name).is_file():
                if body:
                    given.append(Path(path).name)
                self.send((folder / Path(path).name).read_bytes(), "application/octet-stream", body)
            else:
                self.send_error(404)

        def send(self, content: bytes, kind: str, body: bool) -> None:
            self.send_response(200)
            for key, value in {
                "Content-Type": kind,
                "Content-Length": str(len(content)),
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
            }.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", given
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
