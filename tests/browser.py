"""Headless Chromium for tests and screenshots, driven by the WebDriver protocol, which needs no package."""

import base64
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path


class Browser:
    """Chromium, driven by the WebDriver protocol, which needs no package."""

    def __init__(self, folder: Path, width: int = 900, height: int = 900):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self._address = f"http://127.0.0.1:{port}/session"
        self._driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-dev-shm-usage",
            "--autoplay-policy=no-user-gesture-required",
            f"--window-size={width},{height}",
        ]
        options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        options.append(f"--user-data-dir={folder}")
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": options}, "timeouts": {"script": 30_000}}
        for _ in range(100):
            try:
                answer = self._ask("", {"capabilities": {"alwaysMatch": wanted}})
                break
            except (ConnectionError, urllib.error.URLError):
                time.sleep(0.1)
        self._session = f"/{answer['sessionId']}"

    def _ask(self, path: str, content: dict | None = None):
        request = urllib.request.Request(
            f"{self._address}{path}",
            None if content is None else json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.loads(response.read())["value"]

    def open(self, url: str) -> None:
        self._ask(f"{self._session}/url", {"url": url})

    def evaluate(self, script: str, *arguments):
        """Return the value of an expression. It refers to the arguments as `arguments[0]` and so on."""
        content = {"script": f"return {script}", "args": list(arguments)}
        return self._ask(f"{self._session}/execute/sync", content)

    def wait(self, script: str, seconds: float = 30):
        """Wait until an expression is true in JavaScript, and return its value."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, f"{script} is not true after {seconds} s"
            time.sleep(0.05)
        return value

    def resize(self, width: int, height: int) -> None:
        """
        Set the size of the page in CSS pixels. Windows of Chromium are never narrower than 500, so this emulates a
        phone.
        """
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        self._ask(f"{self._session}/goog/cdp/execute", command)

    def upload(self, selector: str, path: Path) -> None:
        """Choose a file in an `<input type="file">`."""
        self._ask(f"{self._session}/element/{self._find(selector)}/value", {"text": str(path)})

    def click(self, selector: str) -> None:
        self._ask(f"{self._session}/element/{self._find(selector)}/click", {})

    def _find(self, selector: str) -> str:
        found = self._ask(f"{self._session}/element", {"using": "css selector", "value": selector})
        return next(iter(found.values()))

    def settle(self) -> None:
        """Wait until all images are decoded and two frames were drawn."""
        script = """const done = arguments[0];
Promise.all([...document.images].map((image) => image.decode().catch(() => {}))).then(
  () => requestAnimationFrame(() => requestAnimationFrame(() => done(null))))"""
        self._ask(f"{self._session}/execute/async", {"script": script, "args": []})

    def screenshot(self) -> bytes:
        return base64.b64decode(self._ask(f"{self._session}/screenshot"))

    def close(self) -> None:
        request = urllib.request.Request(f"{self._address}{self._session}", method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()
        self._driver.terminate()
        self._driver.wait()
