"""Griffe extension: makes the docstrings of this package, in transformers' style, readable for mkdocstrings."""

import inspect
import re

import griffe


# methods that take their docstring from another one, as in `encode.__doc__ = ...`, which reading the source misses
ASSIGNED = {
    f"wavtokenizer_hf.modeling_wavtokenizer.{name}"
    for name in ("WavTokenizerModel.encode", "WavTokenizerEncoderModel.forward")
}


class RuntimeDocstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.path in ASSIGNED and obj.docstring is None:
            text = inspect.getdoc(griffe.dynamic_import(obj.path))
            obj.docstring = griffe.Docstring(text, parent=obj, parser=griffe.Parser.google)
        if obj.docstring is not None:
            obj.docstring.value = _plain(obj.docstring.value)


def _plain(text: str) -> str:
    """Types of arguments without backticks, and names in [`...`], transformers' links, as code."""
    text = re.sub(r"\[`~?([^`\]]*)`\]", r"`\1`", text)
    return re.sub(
        r"^( *[\w, ]+)\((.*`.*)\):", lambda m: f"{m[1]}({m[2].replace('`', '').replace('*', '')}):", text, flags=re.M
    )
