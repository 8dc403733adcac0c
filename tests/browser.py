"""A headless Chromium, driven through its own protocol (CDP) over a web socket."""

import base64
import contextlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
"""The program; None where there is none."""

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)
SECONDS = 60
"""To wait for anything; a machine that is busy is slow."""

KEYS = {"Tab": 9, "End": 35, "Home": 36, "Escape": 27}
KEYS |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Page:
    """A tab.

    Attributes:
      errors: what its console said as errors, and exceptions that nothing caught.
      requests: addresses that it asked for.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loaded = 0
        self._session: dict[str, Any] = {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Asks, and waits for the answer."""
        number = next(self._numbers)
        asked = {"id": number, "method": method, "params": params, **self._session}
        self._socket.send(json.dumps(asked))
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        said = json.loads(self._socket.recv(timeout=SECONDS))
        about = said.get("params", {})
        match said.get("method"):
            case "Page.loadEventFired":
                self._loaded += 1
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])
            case "Runtime.exceptionThrown":
                self.errors.append(str(about["exceptionDetails"]))
            case "Log.entryAdded" if about["entry"]["level"] in ("error", "warning"):
                self.errors.append(about["entry"]["text"])
            case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning"):
                self.errors.append(str(about["args"]))
        return said

    def open(self, path: pathlib.Path) -> float:
        """Opens a file; returns the seconds until it is loaded and painted."""
        self.errors, self.requests, before = [], [], self._loaded
        began = time.perf_counter()
        self.send("Page.navigate", url=path.resolve().as_uri())
        while self._loaded == before:
            self._next()
        # The first picture is of the page as it has been laid out and painted.
        self.send("Page.captureScreenshot", format="jpeg", quality=1)
        return time.perf_counter() - began

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript, or of what it promises."""
        answer = self.send(
            "Runtime.evaluate",
            expression=script,
            returnByValue=True,
            awaitPromise=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Returns when a condition in JavaScript holds."""
        until = time.monotonic() + SECONDS
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < until, f"never held: {condition}"
            time.sleep(0.02)

    def point(self, selector: str) -> None:
        """Moves the pointer to the middle of an element, which is scrolled to."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const r = e.getBoundingClientRect();"
            "return [r.left + r.width / 2, r.top + r.height / 2]; })()"
        )
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        """Presses a key."""
        named = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.send("Input.dispatchKeyEvent", type="rawKeyDown", **named)
        self.send("Input.dispatchKeyEvent", type="keyUp", **named)

    def dark(self, dark: bool) -> None:
        """Says which colours the reader prefers."""
        wish = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[wish])

    def picture(self, path: pathlib.Path, width: int = 1200) -> None:
        """Writes a PNG of the whole page."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1}
        self.send("Emulation.setDeviceMetricsOverride", **metrics, mobile=False)
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        taken = self.send(
            "Page.captureScreenshot",
            captureBeyondViewport=True,
            clip={**size, "scale": 1},
        )
        path.write_bytes(base64.b64decode(taken["data"]))


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A tab in a Chromium of its own, which ends with the context."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            port, path = _address(process, pathlib.Path(folder))
            address = f"ws://127.0.0.1:{port}{path}"
            options = {"max_size": None, "open_timeout": SECONDS}
            with connect(address, **options) as socket:
                yield Page(socket)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _address(process: subprocess.Popen, folder: pathlib.Path) -> tuple[str, str]:
    """Port and path that Chromium writes down when it listens."""
    written, until = folder / "DevToolsActivePort", time.monotonic() + SECONDS
    while time.monotonic() < until:
        assert process.poll() is None, f"Chromium ended with {process.returncode}"
        lines = written.read_text().split() if written.exists() else []
        if len(lines) == 2:
            return lines[0], lines[1]
        time.sleep(0.05)
    raise TimeoutError("Chromium did not start to listen")
