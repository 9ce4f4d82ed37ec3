"""The page of `wavtokenizer demo`: its computations, and its appearance to a visitor in headless Chromium."""

import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from browser import Browser
from conftest import load_script

from wavtokenizer_hf import audio
from wavtokenizer_hf.cli import main
from wavtokenizer_hf.demo import build_page, launch
from wavtokenizer_hf.demo.codec import Codec, parse_tokens


SPACE = Path(__file__).parent.parent / "examples" / "space"
CODES = [3, 1, 4, 1, 5, 9, 2, 6]
NOISE = 0.5 * np.random.default_rng(0).uniform(-1, 1, 24_005).astype(np.float32)


@pytest.fixture
def model_folder(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def codec(model_folder):
    return Codec([model_folder], max_seconds=2)


@pytest.fixture
def clip(tmp_path):
    soundfile.write(tmp_path / "noise.wav", NOISE, 24_000, subtype="FLOAT")
    return tmp_path / "noise.wav"


# ---------------------------------------------------------------------------------------------------------------------
# Computations of the page
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"audio_codes": CODES, "num_samples": 120, "codebook_fingerprint": "f"}),
        json.dumps({"id": "a.wav", "audio_codes": CODES, "num_samples": 120, "codebook_fingerprint": "f"}, indent=2),
        str({"id": "it's", "audio_codes": CODES, "num_samples": 120, "codebook_fingerprint": "f", "text": None}),
        "{'audio_codes': array([3, 1, 4, 1, 5,\n   9, 2, 6], dtype=uint16), 'num_samples': 120, "
        "'codebook_fingerprint': 'f'}",
        " ".join(map(str, CODES)),
        str(CODES),
        "\n".join(map(str, CODES)) + "\n",
    ],
)
def test_pasted_tokens_are_read(text):
    fields = parse_tokens(text)
    np.testing.assert_array_equal(fields["audio_codes"], CODES)
    if text.startswith("{"):
        assert (fields["num_samples"], fields["codebook_fingerprint"]) == (120, "f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Got no tokens"),
        ("1 2 three", "Got 'three' among the tokens"),
        ("-1 2", "Got '-1 2' among the tokens"),
        ('{"audio_codes": [1, 2', "Is its end missing?"),
        ('{"codes": [1, 2]}', "no list of integers under audio_codes"),
        ('{"audio_codes": [1.5]}', "no list of integers under audio_codes"),
        ("70000", "expected numbers from 0 to 65535"),
        ("9" * 5000, "expected numbers from 0 to 65535"),
        ("{" * 100_000, "Is its end missing?"),
        ("__import__('os')", "among the tokens"),
        ("{'audio_codes': __import__('os')}", "Is its end missing?"),
        ("1 " * 1_500_000, "expected at most 2,000,000"),
    ],
)
def test_other_text_is_refused_with_the_reason(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_tokens(text)


def test_a_clip_becomes_codes_and_decoded_audio_of_the_same_length(codec, clip, model_folder, tiny_model):
    result = codec.reconstruct(str(clip), model_folder)
    values = torch.from_numpy(NOISE)[None, None]
    codes = tiny_model.encode(values).audio_codes
    np.testing.assert_array_equal(result.tokens.audio_codes, codes[0, 0].numpy())
    decoded = tiny_model.decode(codes).audio_values[0, 0, : len(NOISE)].detach().numpy()
    np.testing.assert_array_equal(result.reconstruction, decoded)
    np.testing.assert_array_equal(result.original, NOISE)
    assert result.facts["duration"] == "1.00 s" and result.facts["rate"] == "1500 tokens/s, 9000 bit/s"
    again = codec.decode(result.tokens.to_bytes("json").decode(), model_folder)
    np.testing.assert_array_equal(again.reconstruction, result.reconstruction)


def test_bad_input_gives_a_message_with_the_next_step(codec, clip, model_folder, tmp_path):
    (tmp_path / "broken.flac").write_bytes(b"fLaC and then nothing")
    soundfile.write(tmp_path / "long.wav", np.zeros(50_000), 24_000)
    fingerprint = '{"audio_codes": [1, 2], "codebook_fingerprint": "0123456789abcdef"}'
    cases = [
        (lambda: codec.reconstruct(None, model_folder), "Record, upload or choose one first"),
        (lambda: codec.reconstruct(str(tmp_path / "broken.flac"), model_folder), "Choose another file"),
        (lambda: codec.reconstruct(str(tmp_path / "long.wav"), model_folder), "takes up to 2 s. Cut it"),
        (lambda: codec.reconstruct(str(clip), "gpt/two"), f"expected one of {model_folder}"),
        (lambda: codec.reconstruct(str(clip), ""), "Got no model"),
        (lambda: codec.decode(" ".join(["1"] * 4000), model_folder), "takes up to 2 s"),
        (lambda: codec.decode(fingerprint, model_folder), "0123456789abcdef"),
        (lambda: codec.decode("1 2 63 64", model_folder), "64"),
    ]
    for work, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            work()
        assert str(tmp_path / "broken") not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "PORT"], "Choose another with --port (0: any free one)"),
        (["--port", "70000"], "expected a number from 0 to 65535"),
        (["--max-seconds", "0"], "expected more than 0 and at most 300"),
        (["-m", "small-speach-75"], "Did you mean small-speech-75"),
        (["--host", "no.such.host.invalid"], "--host (127.0.0.1: this machine)"),
    ],
)
def test_invalid_demo_commands_give_one_line(arguments, message, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert main(["demo", *(port if argument == "PORT" else argument for argument in arguments)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_space_runs_the_same_page_with_the_gradio_that_is_tested():
    pytest.importorskip("gradio")
    header = (SPACE / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in header and "app_file: app.py" in header
    version = re.search(r"^gradio==(.+)$", (SPACE.parent.parent / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert f"sdk_version: {version}" in header
    assert load_script(SPACE / "app.py").page.title == "WavTokenizer"
    assert "wavtokenizer_hf[demo]" in (SPACE / "requirements.txt").read_text()


def test_the_page_sends_no_analytics(model_folder):
    pytest.importorskip("gradio")
    page = build_page([model_folder])
    assert page.analytics_enabled is False


# ---------------------------------------------------------------------------------------------------------------------
# The page in a browser
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path):
    if not shutil.which("chromedriver"):
        pytest.skip("needs chromedriver and Chromium")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.fixture
def page(model_folder):
    """Serve the page with the tiny model, and return its address."""
    pytest.importorskip("gradio")
    page = build_page([model_folder], max_seconds=2)
    yield launch(page, port=None, block=False)
    page.close()


SET_TEXT = """(() => {
  const area = document.querySelector('#wt-text textarea');
  Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set.call(area, arguments[0]);
  area.dispatchEvent(new Event('input', {bubbles: true}));
})()"""


def test_a_visitor_uploads_hears_and_pastes(page, browser, clip, tmp_path, tiny_model):
    browser.open(page)
    browser.wait("document.querySelector('#wt-clip input[type=file]') && document.querySelector('#wt-encode')")

    browser.click("#wt-encode")  # no file was chosen
    browser.wait("document.querySelector('#wt-error [role=alert]')?.textContent.includes('Got no clip')")

    browser.upload("#wt-clip input[type=file]", clip)
    browser.wait("document.querySelector('#wt-clip .waveform-container, #wt-clip [data-testid^=waveform]')")
    browser.click("#wt-encode")
    browser.wait("document.querySelector('#wt-result .wt-tokens')")
    assert not browser.evaluate("document.querySelector('#wt-error [role=alert]')")
    shown = browser.evaluate("document.querySelector('#wt-result .wt-tokens').textContent")
    codes = tiny_model.encode(torch.from_numpy(audio.load(clip))[None, None]).audio_codes[0, 0].tolist()
    assert [int(code) for code in shown.split()] == codes
    facts = browser.evaluate("document.querySelector('#wt-result .wt-facts').textContent")
    assert "1.00 s" in facts and "9000 bit/s" in facts

    browser.evaluate("document.querySelector('#wt-result audio.wt-reconstruction').play()")
    browser.wait("document.querySelector('#wt-result audio.wt-reconstruction').currentTime > 0.3")
    browser.wait("document.querySelector('#wt-result .wt-now')")
    assert browser.evaluate("parseFloat(document.querySelector('#wt-result .wt-line').style.left)") > 20

    tokens = browser.evaluate("document.querySelector('#wt-json textarea').value")
    assert json.loads(tokens)["audio_codes"] == codes
    browser.evaluate(
        "[...document.querySelectorAll('button[role=tab]')].find(t => t.textContent.includes('Tokens')).click()"
    )
    browser.wait("document.querySelector('#wt-text textarea')?.offsetParent")
    browser.evaluate(SET_TEXT, tokens)
    browser.click("#wt-decode")
    browser.wait("document.querySelector('#wt-decoded audio')")
    assert browser.evaluate(
        "document.querySelector('#wt-decoded audio').src == document.querySelector('#wt-result "
        "audio.wt-reconstruction').src"
    )

    browser.resize(360, 700)  # the size of a phone
    browser.wait("document.documentElement.clientWidth == 360")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    assert browser.evaluate("document.querySelector('#wt-decoded img').clientWidth") > 200


def test_a_visitor_sees_what_is_wrong_with_a_file(page, browser, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF and then nothing")
    browser.open(page)
    browser.wait("document.querySelector('#wt-clip input[type=file]') && document.querySelector('#wt-encode')")
    browser.upload("#wt-clip input[type=file]", tmp_path / "broken.wav")
    browser.wait("!document.querySelector('#wt-clip input[type=file]')")
    browser.click("#wt-encode")
    browser.wait("document.querySelector('#wt-error [role=alert]')")
    said = browser.evaluate("document.querySelector('#wt-error [role=alert]').textContent")
    assert "broken.wav" in said and "Choose another file" in said and str(tmp_path) not in said
