"""Packages of the extras that exports need, imported where they are used."""

from importlib import import_module


def import_optional(name: str, extra: str = "onnx"):
    """Import a module. Raises ImportError that names the extra if it is missing."""
    try:
        return import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ImportError(f"This export needs {package}: pip install 'wavtokenizer_hf[{extra}]'") from error
