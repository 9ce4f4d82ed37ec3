"""`wavtokenizer demo`: a page to see and hear the codec."""

import argparse
import socket

from ..model_names import find_torch_model, published_names
from .arguments import MODEL_HELP, Commands, UsageError, add_command, quiet_transformers


LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def add(commands: Commands) -> None:
    demo = add_command(
        commands,
        "demo",
        _demo,
        "Record, upload or choose a clip. Hear the original and the reconstruction, see both spectrograms and the "
        "tokens, and paste tokens back. No data leaves this machine unless --share is given. Needs the extra `demo`.",
        example="-m bundled small-speech-75",
    )
    demo.add_argument(
        "-m",
        "--model",
        nargs="+",
        metavar="MODEL",
        help=f"models to choose from, of which the first is selected: {MODEL_HELP}. Default: bundled and all "
        "published checkpoints; only bundled if other machines can open the page",
    )
    demo.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, this machine only); 0.0.0.0: all addresses of this machine",
    )
    demo.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860); 0: any free port")
    demo.add_argument(
        "--share", action="store_true", help="also open a public address at Gradio's servers, for 7 days"
    )
    demo.add_argument(
        "--max-seconds",
        type=float,
        default=60,
        metavar="SECONDS",
        help="longest clip, in seconds, at most 300 (default: 60)",
    )


def _demo(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.max_seconds <= 300:
        raise UsageError(f"Got --max-seconds {arguments.max_seconds:g}, expected more than 0 and at most 300.")
    if not 0 <= arguments.port < 65536:
        raise UsageError(f"Got --port {arguments.port}, expected a number from 0 to 65535.")
    is_private = arguments.host in LOCAL_HOSTS and not arguments.share
    models = arguments.model or ["bundled", *(published_names() if is_private else [])]
    for name in arguments.model or ():
        find_torch_model(name)
    port = _free_port(arguments.host, arguments.port)

    from .. import demo

    page = demo.build_page(models, any_model=is_private, max_seconds=arguments.max_seconds)
    quiet_transformers()
    demo.launch(page, arguments.host, port, arguments.share)
    return 0


def _free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0. Raises OSError if it is not available."""
    try:
        with socket.create_server((host, port)) as server:
            return server.getsockname()[1]
    except OSError as error:
        raise OSError(
            f"Cannot listen on port {port} of {host}: {error.strerror or error}. Choose another with --port (0: any "
            "free one) or --host (127.0.0.1: this machine)."
        ) from error
