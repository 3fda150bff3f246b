"""Open a page in a real headless Chromium, and drive it over the DevTools protocol."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Debian's package chromium is not installed")

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip


class Tab:
    """A page: what it logs and requests is kept."""

    def __init__(self, loop, socket):
        self._loop, self._socket, self._numbers = loop, socket, itertools.count(1)
        self.errors, self.requests = [], []

    def call(self, method, **parameters):
        """Call a method of the DevTools protocol and return its result."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), 60))

    async def _call(self, method, parameters):
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive()).data)
            self._note(message)
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def _note(self, message):
        method, told = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(told["exceptionDetails"])
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"])
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(told["args"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    def show(self, file: Path, *, width=1200, height=900, dark=False):
        """Open a file in a window of this size, and wait until it has drawn."""
        self.open(file.absolute().as_uri(), width=width, height=height, dark=dark)

    def open(self, url: str, *, width=1200, height=900, dark=False):
        """Open a page in a window of this size, and wait until it is there."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Emulation.setTouchEmulationEnabled", enabled=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def eval(self, expression):
        """Return the value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression):
        """Wait until a JavaScript expression is true."""
        for _ in range(600):
            if self.eval(f"Boolean({expression})"):
                return
            time.sleep(0.05)
        raise AssertionError(f"never true: {expression}")

    def wait_for_frame(self):
        """Wait until the browser has drawn what was asked of it, and has told the page of it."""
        self.eval("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def draw_all(self):
        """Scroll through the page, so that each plot is drawn, and back."""
        self.eval("document.documentElement.style.scrollBehavior = 'auto'")
        for share in [i / 20 for i in range(21)] + [0]:
            self.eval(f"scrollTo(0, {share} * document.body.scrollHeight)")
            self.wait_for_frame()
        self.wait("[...document.querySelectorAll('[data-chart]')].every((figure) => figure.querySelector('svg'))")

    def click(self, x, y, kind="click"):
        """Move the mouse to a place of the window, and click there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if kind == "click":
            for event in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=event, x=x, y=y, button="left", clickCount=1)

    def tap(self, x, y):
        """Touch a place of the window with a finger."""
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def screenshot(self, file: Path):
        """Write a picture of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser():
    """Start Chromium, and give one tab of it."""
    # Its helper processes may still write into the folder for a moment after it has ended.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        loop = asyncio.new_event_loop()
        session = None
        try:
            session, tab = loop.run_until_complete(asyncio.wait_for(_first_tab(loop, Path(folder)), 60))
            yield tab
        finally:
            if session is not None:
                loop.run_until_complete(session.close())
            process.terminate()
            process.wait(30)
            loop.close()


async def _first_tab(loop, folder):
    told = folder / "DevToolsActivePort"
    # It is there before anything is in it, and before the browser has a page.
    while not told.exists() or not (lines := told.read_text().split()):
        await asyncio.sleep(0.05)
    session = aiohttp.ClientSession()
    try:
        while True:
            async with session.get(f"http://127.0.0.1:{lines[0]}/json") as answer:
                pages = [page for page in await answer.json() if page["type"] == "page"]
            if pages:
                address = pages[0]["webSocketDebuggerUrl"]
                return session, Tab(loop, await session.ws_connect(address, max_msg_size=0))
            await asyncio.sleep(0.05)
    except BaseException:
        await session.close()
        raise
