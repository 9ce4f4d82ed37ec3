"""The page: a Gradio app that calls `Codec` and shows what it returns."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..extras import require
from ..limited_files import one_line
from ..progress import write
from .codec import Codec, Result
from .result import SCRIPT, STYLE, message, render


CLIPS = Path(__file__).parent / "clips"
INTRODUCTION = """# WavTokenizer
Audio to one stream of 40 or 75 tokens per second, and back. The bundled model is small and sounds rough. Choose a
published checkpoint to hear what the codec can do."""


def build_page(models: Sequence[str] = ("bundled",), any_model: bool = False, max_seconds: float = 60) -> Any:
    """
    Return the page, a `gradio.Blocks`.

    Args:
        models: Names of the models to choose from. The first one is selected.
        any_model: Whether a visitor may also type a folder of this machine or a name on the Hub. Do not allow this on
            a public page.
        max_seconds: Longest clip, in seconds.

    Raises:
        ImportError: Gradio is not installed.
    """
    gradio = require("gradio", "demo")
    codec = Codec(models, any_model, max_seconds)

    def reconstruct(path: str | None, model: str) -> tuple[str, str, str]:
        name = "clip" if path is None else Path(path).stem
        return _answer(lambda: codec.reconstruct(path, model), name)

    def decode(text: str, model: str) -> tuple[str, str]:
        return _answer(lambda: codec.decode(text, model), "pasted")[:2]

    with gradio.Blocks(title="WavTokenizer", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.HTML(f"<style>{STYLE}</style>", padding=False)
        gradio.Markdown(INTRODUCTION)
        model = gradio.Dropdown(
            list(models),
            value=models[0],
            label="Model",
            info="Or type a folder, or OWNER/NAME on the Hub." if any_model else None,
            allow_custom_value=any_model,
            elem_id="wt-model",
        )
        with gradio.Tab("Audio to tokens"):
            clip = gradio.Audio(
                sources=["upload", "microphone"],
                type="filepath",
                label=f"Clip, up to {max_seconds:g} s",
                elem_id="wt-clip",
            )
            gradio.HTML('<p id="wt-record-hint"></p>', padding=False)
            gradio.Examples([[str(path)] for path in sorted(CLIPS.glob("*.flac"))], [clip], label="Or choose one")
            button = gradio.Button("Encode and decode", variant="primary", elem_id="wt-encode")
            error, result = gradio.HTML(elem_id="wt-error"), gradio.HTML(elem_id="wt-result")
            tokens = gradio.Textbox(
                label="Token file, to copy",
                lines=3,
                max_lines=6,
                buttons=["copy"],
                elem_id="wt-json",
                interactive=False,
            )
            button.click(
                reconstruct, [clip, model], [error, result, tokens], concurrency_id="codec", api_visibility="private"
            )
        with gradio.Tab("Tokens to audio"):
            text = gradio.Textbox(
                label="Tokens",
                info="A token file in JSON, a row of a Parquet file of `wavtokenizer tokenize`, or numbers.",
                lines=6,
                max_lines=12,
                elem_id="wt-text",
            )
            decode_button = gradio.Button("Decode", variant="primary", elem_id="wt-decode")
            decode_error, decoded = gradio.HTML(elem_id="wt-decode-error"), gradio.HTML(elem_id="wt-decoded")
            decode_button.click(
                decode, [text, model], [decode_error, decoded], concurrency_id="codec", api_visibility="private"
            )
        page.load(None, None, None, js=SCRIPT)
    return page


def launch(
    page: Any, host: str = "127.0.0.1", port: int | None = None, share: bool = False, block: bool = True
) -> str:
    """
    Serve the page and return its address.

    Args:
        page: Page of `build_page`.
        host: Address to listen on; 0.0.0.0 for all addresses of this machine.
        port: Port to listen on; None for the first free one from 7860.
        share: Whether to open a public address at Gradio's servers.
        block: Whether to wait until the server ends.

    Raises:
        OSError: The port is in use.
    """
    gradio = require("gradio", "demo")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    fonts = (
        ["system-ui", "sans-serif"],
        ["ui-monospace", "monospace"],
    )  # Gradio would load its own fonts from the network
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        max_file_size="200mb",
        theme=gradio.themes.Default(font=fonts[0], font_mono=fonts[1]),
    )
    address = page.share_url or page.local_url
    write(f"The page is at {address} (Ctrl+C ends it)")
    if block:
        try:
            page.block_thread()
        finally:  # also on SIGTERM: the process would otherwise wait for the server's thread
            page.close(verbose=False)
    return address


def _answer(work: Callable[[], Any], name: str) -> tuple[str, str, str]:
    """Return an error message, the result as HTML, and the tokens as JSON. Without an error the message is empty."""
    try:
        result: Result = work()
    except (ValueError, OSError, ImportError, MemoryError) as error:
        return message(one_line(error) or "There is too little memory for this clip."), "", ""
    return "", render(result, name), result.tokens.to_bytes("json").decode().strip()
