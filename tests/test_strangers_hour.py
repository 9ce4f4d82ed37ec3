"""The first hour of a new user: a fresh clone, an empty environment, and only the commands of README and docs.

The steps take their commands from the pages, so a step fails if it needs more than they state. The test needs git,
make and pip's index. It installs everything again, which takes minutes and some gigabytes.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import ROOT, tiny_config
from hub_server import put_into_cache
from small_checkpoints import small_tensors
from test_docs import blocks

from wavtokenizer_hf import WavTokenizerFeatureExtractor, WavTokenizerModel


WITHOUT_THE_PACKAGE = "import sys\nsys.modules['wavtokenizer_hf'] = None\n"


class Stranger:
    """A shell in a folder next to a clone, with a Hub cache and no network access to the Hub."""

    def __init__(self, folder: Path):
        self.clone, self.work, self.times = folder / "clone", folder / "work", {}
        self.work.mkdir()
        own = {"PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS"}
        self.environment = {name: value for name, value in os.environ.items() if name not in own}
        paths = [p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "../pyvenv.cfg").exists()]
        self.environment |= {"PATH": os.pathsep.join(paths), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
        self.cache = folder / "hf" / "hub"

    def shell(self, command: str, folder: Path | None = None, activate: bool = True) -> str:
        """Run a command as the pages print it, and return its standard output."""
        lines = ["set -euo pipefail", f"source '{self.clone}/.venv/bin/activate'" if activate else "", command]
        result = subprocess.run(
            ["bash", "-c", "\n".join(lines)],
            cwd=folder or self.work, env=self.environment, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        return result.stdout

    def python(self, code: str) -> str:
        (self.work / "script.py").write_text(code)
        return self.shell("python script.py")

    @contextlib.contextmanager
    def step(self, name: str):
        started = time.monotonic()
        yield
        self.times[name] = round(time.monotonic() - started, 1)
        print(f"{name}: {self.times[name]} s", flush=True)

    def page(self, name: str) -> Path:
        return self.clone / name

    def command(self, page: str, beginning: str) -> str:
        """Return the command of a page that begins with this text."""
        lines = "\n".join(blocks(self.page(page), "sh")).splitlines()
        (found, *_) = [line for line in lines if line.startswith(beginning)]
        return found


def fill_cache(cache: Path, folder: Path) -> None:
    """
    Write the cache entries of downloads: a small checkpoint with the name of a published one, and a folder of native
    files.
    """
    checkpoint = folder / "WavTokenizer_small_320_24k_4096.ckpt"
    torch.save({"state_dict": small_tensors(75)}, checkpoint)
    put_into_cache(cache, "novateur/WavTokenizer", {checkpoint.name: checkpoint})
    torch.manual_seed(0)
    WavTokenizerModel(tiny_config()).save_pretrained(folder / "native")
    WavTokenizerFeatureExtractor(hop_length=16).save_pretrained(folder / "native")
    files = {path.name: path for path in (folder / "native").iterdir() if path.suffix != ".py"}
    put_into_cache(cache, "swiss-ai/wavtokenizer-large-unify-40token", files)


def ask_page(address: str, clip: Path) -> dict:
    """Upload a clip and press the button, over HTTP as the page does it. Return the token file that it shows."""

    def get(path: str, data: bytes | None = None, **headers) -> bytes:
        with urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=120) as response:
            assert response.status == 200
            return response.read()

    def post(path: str, content: dict) -> dict:
        return json.loads(get(path, json.dumps(content).encode(), **{"Content-Type": "application/json"}))

    assert b"gradio" in get("/")
    config = json.loads(get("/config"))
    ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
    (press,) = (d for d in config["dependencies"] if [ids["wt-encode"], "click"] in [list(t) for t in d["targets"]])
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="clip.flac"\r\n\r\n' + clip.read_bytes()
    (path,) = json.loads(
        get("/gradio_api/upload", body + b"\r\n--b--\r\n", **{"Content-Type": "multipart/form-data; boundary=b"})
    )
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, "bundled"]
    post("/gradio_api/queue/join", {"fn_index": press["id"], "data": data, "session_hash": "stranger"})
    events = get("/gradio_api/queue/data?session_hash=stranger").decode()
    (done,) = (
        e for e in map(json.loads, re.findall(r"^data: (.*)$", events, re.M)) if e["msg"] == "process_completed"
    )
    assert done["success"], done
    error, _, tokens = done["output"]["data"]
    assert not error, error
    return json.loads(tokens)


@pytest.mark.slow
def test_the_documented_commands_lead_from_a_clone_to_a_trained_model_and_a_demo_page(tmp_path):
    stranger = Stranger(tmp_path)
    fill_cache(stranger.cache, tmp_path)
    with stranger.step("clone"):
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(stranger.clone)], check=True)
    with stranger.step("set up, and demo"):
        stranger.shell(stranger.command("README.md", "make demo"), stranger.clone, activate=False)
    assert soundfile.info(stranger.clone / "demo_output" / "speech.wav").frames > 0
    assert "source .venv/bin/activate" in stranger.command("README.md", "source")

    for name in ("speech.flac", "synthetic.flac"):
        for folder in ("", "corpus", "clips", "other_clips"):
            (stranger.work / folder).mkdir(exist_ok=True)
            shutil.copy(stranger.clone / "examples" / name, stranger.work / folder)

    with stranger.step("load: bundled, by name, native folder"):
        stranger.python("\n".join(blocks(stranger.page("docs/models.md"), "python")))
    with stranger.step("load: in transformers alone"):
        converted = "wavtokenizer-small-speech-75"
        stranger.shell(
            stranger.command(
                "docs/models.md", f"wavtokenizer convert --checkpoint small-speech-75 --output {converted}"
            )
        )
        card = blocks(stranger.work / converted / "README.md", "python")
        (alone,) = (block for block in card if "AutoModel" in block and "trust_remote_code" not in block)
        checked = "\nassert type(model).__module__.startswith('transformers.models.'), type(model)"
        stranger.python(WITHOUT_THE_PACKAGE + alone + checked)
    with stranger.step("encode and decode in Python"):
        stranger.python("\n".join(blocks(stranger.page("README.md"), "python")))
    for kind in ("encode", "decode", "reconstruct", "tokenize", "evaluate"):
        with stranger.step(kind):
            stranger.shell(stranger.command("README.md", f"wavtokenizer {kind}"))
    assert json.loads((stranger.work / "tokens" / "manifest.json").read_text())["complete"]
    with stranger.step("train for a minute"):
        stranger.shell(stranger.command("docs/training.md", "wavtokenizer train small_cpu --steps"))
    with stranger.step("evaluate what was trained"):
        stranger.shell(stranger.command("docs/training.md", "wavtokenizer evaluate --model trial/best"))
    report = json.loads((stranger.work / "trial-report" / "report.json").read_text())
    assert report["systems"][0]["metrics"]["stoi"]["mean"] is not None

    with stranger.step("page"):
        command = f"source '{stranger.clone}/.venv/bin/activate'; exec " + stranger.command(
            "docs/getting-started.md", "wavtokenizer demo"
        )
        page = subprocess.Popen(
            ["bash", "-c", f"{command} --port 0"],
            cwd=stranger.work, env=stranger.environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            address = next(m[1] for line in page.stdout if (m := re.search(r"The page is at (http://\S+?)/? ", line)))
            tokens = ask_page(address, stranger.work / "speech.flac")
        finally:
            page.send_signal(signal.SIGTERM)
            page.wait(60)
    again = json.loads(stranger.shell("wavtokenizer info speech.safetensors --json"))
    assert len(tokens["audio_codes"]) == again["num_tokens"]
    assert tokens["codebook_fingerprint"] == again["codebook_fingerprint"]
    (tmp_path / "times.json").write_text(json.dumps(stranger.times, indent=1))
