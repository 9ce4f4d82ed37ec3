"""Page to see and hear the codec: `wavtokenizer demo`, or a Space (examples/space). Needs the extra `demo` (Gradio).

codec.py   encodes and decodes for the page: a clip to tokens and back, pasted tokens to audio
result.py  renders a result as HTML: players, spectrograms and tokens with one cursor
page.py    builds and serves the page
"""

from .page import build_page, launch


__all__ = ["build_page", "launch"]
