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
            options = {"warnings": False, "returns_multiple_items": False, "returns_named_value": False}
            obj.docstring = griffe.Docstring(text, parent=obj, parser=griffe.Parser.google, parser_options=options)
        if obj.docstring is not None:
            obj.docstring.value = _plain(obj.docstring.value)


def _plain(text: str) -> str:
    """Types of arguments without backticks and defaults, which the signature has; names in [`...`] as code."""
    text = re.sub(r"\[`~?([^`\]]*)`\]", r"`\1`", text)
    text = re.sub(r"^( *)`([\w.]+)`:", r"\1\2:", text, flags=re.MULTILINE)
    return re.sub(r"^( *[\w, ]+)\((.*`.*)\):", _plain_type, text, flags=re.MULTILINE)


def _plain_type(match: re.Match) -> str:
    type_ = re.sub(r", \*optional\*|, defaults? to .*|[`*]", "", match[2])
    return f"{match[1]}({type_}):"
