"""Drive Chromium over its debugging protocol: press keys, click, and read the page."""

import asyncio
import base64
import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

LIMIT_S = 300
KEYS = {"Enter": (13, "\r"), "Escape": (27, "")}


class DrivenPage:
    """One page of a browser."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._socket, self._number = loop, socket, 0
        self.console: list[str] = []
        """Exceptions in the page, and violations of its content security policy."""

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the protocol, and return its result."""
        return self._loop.run_until_complete(self._send_message(method, parameters))

    async def _send_message(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Send a command; the browser sends events (errors go to `console`) before the result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = json.loads(await self._socket.receive_str(timeout=LIMIT_S))
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.console.append(json.dumps(message["params"]))
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def value(self, expression: str) -> Any:
        """Evaluate an expression in the page, and return its value."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true in the page."""
        deadline_s = time.monotonic() + LIMIT_S
        while not self.value(expression):
            assert time.monotonic() < deadline_s, (expression, self.console)
            time.sleep(0.02)

    def open(self, url: str, width: int = 1440, height: int = 900, scheme: str = "light") -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        code, text = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      text=text if kind == "keyDown" else "", modifiers=8 if shift else 0)

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def drive_browser(browser: str, folder: Path) -> Iterator[DrivenPage]:
    """Yield a page in a browser that runs until the context ends; the browser profile is in `folder`."""
    profile = folder / "profile"
    process = subprocess.Popen(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
         "--hide-scrollbars", f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    loop = asyncio.new_event_loop()
    try:
        with contextlib.closing(loop), _connect(loop, profile / "DevToolsActivePort") as page:
            yield page
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def _connect(loop: asyncio.AbstractEventLoop, file: Path) -> Iterator[DrivenPage]:
    """Connect to the browser's page once the browser prints its address."""
    deadline_s = time.monotonic() + LIMIT_S
    while not file.exists() or not file.read_text().strip():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    port = file.read_text().split()[0]

    async def connect() -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
        session = aiohttp.ClientSession()
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            pages = [page for page in await answer.json() if page["type"] == "page"]
        return session, await session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)

    session, socket = loop.run_until_complete(connect())
    try:
        page = DrivenPage(loop, socket)
        for domain in ("Page", "Runtime", "Log"):
            page.send(f"{domain}.enable")
        yield page
    finally:
        loop.run_until_complete(socket.close())
        loop.run_until_complete(session.close())
