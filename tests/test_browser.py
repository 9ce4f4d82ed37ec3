"""The page of examples/browser, in headless Chromium, gives the same tokens as Python."""

import functools
import http.server
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from browser import Browser

from wavtokenizer_hf import WavTokenizerModel, audio, bundled_model
from wavtokenizer_hf.export import WavTokenizerOnnx, export_onnx


ROOT = Path(__file__).parent.parent
pytest.importorskip("onnx")


@pytest.fixture
def site(tmp_path):
    """Serve the page, the exported model and a recording on this machine."""
    if not (shutil.which("chromedriver") and shutil.which("npm")):
        pytest.skip("needs chromedriver, Chromium and npm")
    folder = tmp_path / "site"
    folder.mkdir()
    for name in ("index.html", "page.js", "package.json"):
        shutil.copy(ROOT / "examples" / "browser" / name, folder)
    installed = ROOT / "examples" / "browser" / "node_modules"
    if installed.is_dir():
        (folder / "node_modules").symlink_to(installed)
    else:
        subprocess.run(["npm", "install", "--ignore-scripts"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    samples = audio.load(ROOT / "examples" / "speech.flac", 24_000)[:72_001]
    soundfile.write(folder / "speech.wav", samples, 24_000, subtype="PCM_16")
    export_onnx(WavTokenizerModel.from_pretrained(bundled_model()).eval(), folder / "model", "bundled")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.mark.slow
def test_the_browser_page_gives_the_same_codes_as_python(site, tmp_path):
    folder, address = site
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(f"{address}/index.html?audio=speech.wav")
        for _ in range(600):
            state = browser.evaluate("document.body.dataset.state")
            if state in ("done", "failed"):
                break
            time.sleep(0.2)
        assert state == "done", browser.evaluate("document.getElementById('status').textContent")
        found = browser.evaluate("document.getElementById('codes').textContent")
        picture = browser.screenshot()
    finally:
        browser.close()
    samples = soundfile.read(folder / "speech.wav", dtype="float32")[0]
    expected = WavTokenizerOnnx(folder / "model").encode(samples[None, None]).audio_codes[0, 0]
    assert len(np.unique(expected)) > 20
    assert [int(code) for code in found.split()] == expected.tolist()
    assert picture.startswith(b"\x89PNG")
    (tmp_path / "page.png").write_bytes(picture)
