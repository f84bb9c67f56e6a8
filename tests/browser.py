"""A headless Chromium for tests of pages, spoken to through a pipe. Also takes the pictures of docs/checking.md:

python -m tests.browser report.html docs/images/check     # makes check-light.png and check-dark.png
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None)
PATIENCE = 60
"""Seconds after which a browser that does not answer is given up."""


class Browser:
    """One page in a browser. `events` are all it told of, in order: requests, console messages, exceptions, violations of the page's policy."""

    def __init__(self) -> None:
        assert CHROMIUM, "there is no chromium on the PATH"
        self.events: list[dict[str, Any]] = []
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        ours, theirs = zip(*((os.fdopen(a, mode), b) for mode, (a, b) in (("wb", self._pipe(True)), ("rb", self._pipe(False)))), strict=True)
        self._to, self._from = ours
        # the browser reads commands from descriptor 3 and writes answers to 4
        script = f'exec "$0" "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe", "--hide-scrollbars"]
        options += ["--disable-background-networking", f"--user-data-dir={self._folder.name}"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, CHROMIUM, *options, "about:blank"], pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for descriptor in theirs:
            os.close(descriptor)
        self._buffer, self._number, self._session = b"", 0, ""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    @staticmethod
    def _pipe(write: bool) -> tuple[int, int]:
        """A pipe as (our end, their end), their end above the numbers that the browser wants."""
        out, into = os.pipe()
        ours, theirs = (into, out) if write else (out, into)
        high = fcntl.fcntl(theirs, fcntl.F_DUPFD, 10)
        os.close(theirs)
        return ours, high

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._from], [], [], PATIENCE)[0], "the browser does not answer"
            part = os.read(self._from.fileno(), 1 << 20)
            assert part, "the browser has gone"
            self._buffer += part
        first, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(first))

    def open(self, path: Path, *, width: int = 1200, height: int = 900, scheme: str = "light", script: bool = True) -> None:
        """Show a file, and wait until it is loaded."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Emulation.setScriptExecutionDisabled", value=not script)
        self.events.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        until = time.monotonic() + PATIENCE
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < until, "the page does not load"
            self.events.append(self._read())

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        """Press and release a key, such as Tab, Enter or ArrowRight."""
        codes = {"Tab": 9, "Enter": 13, "ArrowRight": 39}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], text=text if kind == "keyDown" else "")

    def picture(self, *, whole: bool = False) -> bytes:
        """What is to be seen, or the whole page, as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def requests(self) -> list[str]:
        """The addresses that the page asked for."""
        return [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[Any]:
        """Console messages, exceptions, and what the browser logged."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
        return [event["params"] for event in self.events if event["method"] in kinds]

    def close(self) -> None:
        try:
            self._session = ""
            self.send("Browser.close")
            self._process.wait(PATIENCE)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        finally:
            self._to.close()
            self._from.close()
            self._folder.cleanup()


PIXELS = """(async (png) => {
  const image = await createImageBitmap(await (await fetch(png)).blob());
  const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
  context.drawImage(image, 0, 0);
  const data = context.getImageData(0, 0, image.width, image.height).data;
  let text = "";
  for (let i = 0; i < data.length; i += 30000) text += String.fromCharCode(...data.subarray(i, i + 30000));
  return [image.width, image.height, btoa(text)];
})"""


def smaller(browser: Browser, png: bytes) -> bytes:
    """The same picture in its 256 most frequent colours, about a third of the size; the rare ones become the nearest of these."""
    browser.send("Page.navigate", url="about:blank")
    width, height, data = browser.run(f"{PIXELS}('data:image/png;base64,{base64.b64encode(png).decode()}')")
    raw = base64.b64decode(data)
    pixels = [raw[k : k + 3] for k in range(0, len(raw), 4)]
    colours = [colour for colour, _ in Counter(pixels).most_common()]
    palette = colours[:256]
    nearest = {colour: min(range(len(palette)), key=lambda k: sum((a - b) ** 2 for a, b in zip(palette[k], colour, strict=True))) for colour in colours}
    rows = b"".join(b"\0" + bytes(nearest[pixel] for pixel in pixels[y * width : (y + 1) * width]) for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = ((b"IHDR", header), (b"PLTE", b"".join(palette)), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts)


if __name__ == "__main__":
    browser = Browser()
    for scheme in ("light", "dark"):
        browser.open(Path(sys.argv[1]), height=1480, scheme=scheme)
        Path(f"{sys.argv[2]}-{scheme}.png").write_bytes(smaller(browser, browser.picture()))
    browser.close()
