"""A browser that is asked what a living page shows, and a page that is served."""

from __future__ import annotations

import asyncio
import base64
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "about:blank")
Ask = Callable[[str], Awaitable[Any]]
"""JavaScript -> its value in the page."""


class Browser:
    """One page of a Chromium that was started with `FLAGS`, asked over its debugging port."""

    def __init__(self, profile: Path) -> None:
        self._profile = profile
        self._number = 0
        self.console: list[str] = []
        """What scripts complained of."""

    async def __aenter__(self) -> Browser:
        file = self._profile / "DevToolsActivePort"
        until_s = time.monotonic() + 120
        while not (file.exists() and len(file.read_text().split()) == 2):
            assert time.monotonic() < until_s, "the browser has not started"
            await asyncio.sleep(0.1)
        port = file.read_text().split()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as reply:
            address = next(one["webSocketDebuggerUrl"] for one in await reply.json() if one["type"] == "page")
        self._socket = await self._session.ws_connect(address, max_msg_size=0)
        for domain in ("Page", "Runtime", "Log"):
            await self.send(f"{domain}.enable")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol; returns its result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            told = await self._socket.receive_json()
            if told.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.console.append(str(told["params"]))
            if told.get("id") == self._number:
                return dict(told.get("result", {"error": told.get("error")}))

    async def size(self, width: int, height: int) -> None:
        """Make the screen so many CSS pixels large."""
        await self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                        mobile=width < 600)

    async def open(self, url: str) -> None:
        await self.send("Page.navigate", url=url)

    async def ask(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        found = await self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return found.get("result", {}).get("value")

    async def until(self, script: str, what: str, wait_s: float = 120.0) -> Any:
        """Return an expression's value once it is true."""
        until_s = time.monotonic() + wait_s
        while not (found := await self.ask(script)):
            assert time.monotonic() < until_s, f"the page never shows {what}"
            await asyncio.sleep(0.2)
        return found

    async def picture(self, file: Path, *, whole: bool = False) -> None:
        """Write what the page shows as PNG."""
        found = await self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(found["data"]))


@pytest.fixture
def chromium(browser: str, tmp_path: Path) -> Iterator[Browser]:
    """A browser, ended behind the test."""
    profile = tmp_path / "profile"
    process = subprocess.Popen([browser, *FLAGS, f"--user-data-dir={profile}"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    yield Browser(profile)
    process.kill()
    process.wait()


@pytest.fixture
def watch() -> Iterator[Callable[..., str]]:
    """Return `watch(PATH, ...)`: the address of a page that is served until the test is over."""
    started: list[subprocess.Popen[str]] = []

    def serve(*paths: Path) -> str:
        command = [sys.executable, "-m", "megatron_sov", "watch", *map(str, paths), "--http", "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                                   env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])})
        started.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    yield serve
    for process in started:
        process.kill()
        process.wait()
