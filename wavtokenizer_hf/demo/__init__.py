"""A page to see and hear the codec: `wavtokenizer demo`, or a Space (examples/space). Needs the extra `demo` (Gradio).

codec.py   what the page does: a clip to tokens and back, pasted tokens to audio
result.py  a result as HTML: players, spectrograms and tokens with one cursor
page.py    the page itself
"""

from .page import build_page, launch


__all__ = ["build_page", "launch"]
