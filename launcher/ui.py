"""`trebuchet ui`: the reports of a folder's runs as live pages, on this machine only, read-only.

It listens on 127.0.0.1 and answers GET with a token: once in the address that is printed, then as a cookie of that browser. The Host
header must be this machine's own, so that a page of elsewhere cannot reach it through a name. A run's name in an address is looked up
among the runs that are there and never becomes a path. A run is read again only when its files have changed, which is how 200 of
them are followed. Left out: starting, stopping and changing anything, and other machines (forward the port by ssh).
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Iterable
from hashlib import blake2b
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from .errors import RunError, UserError
from .report import collect, page
from .run_folder import RunFolder

MOST_CURVES = 20  # of the newest runs in the list's chart
Mark = tuple[tuple[int, int], ...]


class Runs:
    """The runs and trials below a folder, each read again when one of its files has another time or size."""

    def __init__(self, root: Path):
        self.root = root
        self.lock = threading.Lock()
        self.kept: dict[str, tuple[Mark, collect.Run]] = {}
        self.reads = 0  # of run folders, since the start

    def folders(self) -> dict[str, RunFolder]:
        """By the name that a page is asked for: RUN, and SWEEP/003 for a trial. The folder may itself be a run or a sweep."""
        here = self.root.absolute()
        found = {file.parent.name: RunFolder(file.parent) for p in ("run.json", "*/run.json") for file in here.glob(p)}
        for file in [*here.glob("trials/*/run.json"), *here.glob("*/trials/*/run.json")]:
            found[f"{file.parents[2].name}/{file.parent.name}"] = RunFolder(file.parent)
        return found

    def all(self) -> dict[str, collect.Run]:
        """Newest first, by name. A folder whose record is being replaced or cannot be read is left out until it can be."""
        with self.lock:
            folders = self.folders()
            self.kept = {name: kept for name, kept in self.kept.items() if name in folders}
            for name, folder in folders.items():
                self._refresh(name, folder)
            newest = sorted(self.kept, key=lambda name: str(self.kept[name][1].record["created"]), reverse=True)
            return {name: self.kept[name][1] for name in newest}

    def one(self, name: str) -> collect.Run | None:
        """By its name, among those that are there."""
        folder = self.folders().get(name)
        if folder is None:
            return None
        with self.lock:
            self._refresh(name, folder)
            kept = self.kept.get(name)
            return kept[1] if kept else None

    def mark(self, names: Iterable[str]) -> str:
        return blake2b(
            repr([(name, self.kept[name][0]) for name in names if name in self.kept]).encode(), digest_size=12
        ).hexdigest()

    def _refresh(self, name: str, folder: RunFolder) -> None:
        mark = tuple(_state(file) for file in (folder.record, folder.metrics, folder.evaluation))
        if name in self.kept and self.kept[name][0] == mark:
            return
        try:
            self.kept[name] = (mark, collect.read(folder))
            self.reads += 1
        except (RunError, KeyError):
            self.kept.pop(name, None)


def _state(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0):
        if not folder.is_dir():
            raise RunError(f"{folder} is not a folder of runs.")
        page.plotly()  # says now what is missing, not in the browser
        self.runs, self.token = Runs(folder.absolute()), secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(
                f"cannot listen on 127.0.0.1:{port}: {error.strerror}; name another one with --port."
            ) from None
        self.port = int(self.server_address[1])

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/?token={self.token}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.headers.get("Host") not in (f"127.0.0.1:{self.server.port}", f"localhost:{self.server.port}"):
            return self.answer(403, "this server answers to 127.0.0.1 only")
        parts = urlsplit(self.path)
        given = parse_qs(parts.query).get("token", [""])[0]
        if given and self.known(given):
            cookie = f"{self.cookie}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
            return self.answer(303, "", {"Location": parts.path, "Set-Cookie": cookie})
        if not self.known(self.sent_cookie()):
            return self.answer(401, "the token is missing or wrong; open the address that `trebuchet ui` printed")
        self.page(unquote(parts.path))

    def page(self, path: str) -> None:
        fragment = path.endswith("/body") or path == "/body"
        name = path.removesuffix("/body").removeprefix("/run/") if path.startswith("/run/") else None
        if name is None and path not in ("/", "/body"):
            return self.answer(404, "there is no such page")
        if name is None:
            runs = self.server.runs.all()
            body = lambda: page.index(runs, MOST_CURVES)  # noqa: E731
        else:
            run = self.server.runs.one(name)
            if run is None:
                return self.answer(404, "there is no such run")
            runs, body = {name: run}, lambda: page.body([run])
        mark = f'"{self.server.runs.mark(runs)}"'
        if fragment and self.headers.get("If-None-Match") == mark:
            return self.answer(304, "", {"ETag": mark})
        if fragment:
            return self.answer(200, body(), {"ETag": mark}, "text/html")
        live = "/body" if name is None else f"/run/{quote(name, safe='')}/body"
        self.answer(200, page.frame(name or "runs", body(), live), {}, "text/html")

    def answer(self, code: int, text: str, headers: dict[str, str] | None = None, kind: str = "text/plain") -> None:
        data = text.encode("utf-8")
        self.send_response(code)
        safe = {
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            "X-Frame-Options": "DENY",
        }
        for key, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(data)),
            **safe,
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    @property
    def cookie(self) -> str:
        return f"trebuchet-{self.server.port}"

    def sent_cookie(self) -> str:
        try:
            found: Any = SimpleCookie(self.headers.get("Cookie", "")).get(self.cookie)
        except CookieError:
            return ""
        return found.value if found else ""

    def known(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.server.token.encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: requests hold the token."""


def serve(folder: str, port: int) -> None:
    """Until Ctrl+C."""
    server = Server(Path(folder).expanduser(), port)
    print(f"{server.address}\nThe runs of {server.runs.root}, on this machine only; Ctrl+C ends it.", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
