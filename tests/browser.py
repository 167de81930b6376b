"""A headless Chromium, controlled through the DevTools protocol, for tests of HTML pages."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """Returns the path of an installed browser, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """A browser with one page; a context manager that starts and stops it.

    Args:
        program: path of the browser.
        profile: empty folder for the browser's files.

    Attributes:
        errors: console errors and warnings, uncaught exceptions and network requests of the page.
    """

    def __init__(self, program: str, profile: Path) -> None:
        self.errors: list[str] = []
        self._program, self._profile = program, profile
        self._sent, self._session = 0, ""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
        options += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={self._profile}"]
        command = [self._program, *options, "--remote-debugging-port=0", "about:blank"]
        quiet = subprocess.DEVNULL
        process = self._stack.enter_context(subprocess.Popen(command, stdout=quiet, stderr=quiet))
        self._stack.callback(process.terminate)  # callbacks run in reverse order: terminate first, then wait
        port, path = self._address(self._profile / "DevToolsActivePort")
        self._socket = self._stack.enter_context(connect(f"ws://127.0.0.1:{port}{path}", max_size=None))
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _address(self, file: Path) -> list[str]:
        for _ in range(600):
            if file.exists() and len(lines := file.read_text().split("\n")) == 2:
                return lines
            time.sleep(0.1)
        raise TimeoutError("the browser did not start")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the DevTools protocol and returns its result; records the events that arrive before it."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while (answer := json.loads(self._socket.recv(timeout=60))).get("id") != self._sent:
            self._record_event(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _record_event(self, event: dict[str, Any]) -> None:
        method, content = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(content["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning"):
            self.errors.append(str(content["args"]))
        elif method == "Log.entryAdded" and content["entry"]["level"] == "error":
            self.errors.append(content["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not content["request"]["url"].startswith(("file:", "data:")):
            self.errors.append(f"asked for {content['request']['url']}")

    def load(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        """Opens a file in a window of the given size, in pixels."""
        mobile = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=path.resolve().as_uri())
        while self.run("document.readyState") != "complete" or self.run("location.protocol") != "file:":
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """Returns the value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """Clicks the middle of an element; if its text has several lines, the middle of the first."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{place}.scrollIntoView({{block: 'center', inline: 'center', behavior: 'instant'}})")
        box = self.run(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({place}.getClientRects()[0])")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str, code: int) -> None:
        """Presses and releases a key, given by its name and its virtual key code."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Saves the visible part of the page, or the whole page, as a PNG."""
        picture = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))
