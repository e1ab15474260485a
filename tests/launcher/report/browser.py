"""A headless Chromium over its debugging protocol: opens a page, runs a line of script, takes a picture, prints.

Where there is no Chromium and root may install one, it is installed by apt; else the tests that need it are skipped, with one line.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage --remote-debugging-port=0 --remote-allow-origins=* --hide-scrollbars"
)


def chromium() -> str | None:
    """The program, installed now when that is possible."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", "fonts-dejavu-core"],
        ):
            subprocess.run(
                command, capture_output=True, timeout=1200, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            )
        found = shutil.which("chromium")
    return found


class Browser:
    def __init__(self, program: str):
        self.home = tempfile.mkdtemp(prefix="browser-")
        command = [program, *FLAGS.split(), f"--user-data-dir={self.home}", "about:blank"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert self.process.stderr is not None
        line = next(line for line in self.process.stderr if line.startswith("DevTools listening on "))
        self.address = line.rpartition(" ")[2].strip()
        self.number = 0
        self.events: list[dict[str, Any]] = []

    def open(self, url: str, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """A fresh page, loaded to its end; what it logs and what it asks for is kept in `events`."""
        import websocket

        port = self.address.split(":")[2].split("/")[0]
        import urllib.request

        ask = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(ask, timeout=120) as answer:
            page = json.load(answer)
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=180)
        self.events = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait("Page.loadEventFired")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def wait(self, event: str) -> None:
        while not any(e.get("method") == event for e in self.events):
            self.events.append(json.loads(self.socket.recv()))

    def follow(self, code: str) -> None:
        """Runs a script that leaves the page, and returns when the next one is loaded: a question in between is lost with the page."""
        loaded = "Page.loadEventFired"
        before = sum(e.get("method") == loaded for e in self.events)
        self.script(code)
        while sum(e.get("method") == loaded for e in self.events) == before:
            self.events.append(json.loads(self.socket.recv()))

    def script(self, code: str) -> Any:
        """The value of an expression; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, uncaught exceptions, and what was asked of a network."""
        bad = []
        for event in self.events:
            kind, params = event.get("method"), event.get("params", {})
            if kind == "Runtime.exceptionThrown" or (
                kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning")
            ):
                bad.append(json.dumps(params)[:400])
            if kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
                bad.append(json.dumps(params["args"])[:400])
        return bad

    def asked(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def picture(self, file: Path, *, whole: bool = True) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=120)
        shutil.rmtree(self.home, ignore_errors=True)
