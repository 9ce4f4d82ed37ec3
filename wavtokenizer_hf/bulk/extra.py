"""Packages of the extra `bulk`, imported when they are used."""

from importlib import import_module


def library(name: str, extra: str = "bulk"):
    """The module of that name. Raises ImportError that names the extra."""
    try:
        return import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ImportError(f"Bulk work needs {package}: pip install 'wavtokenizer_hf[{extra}]'") from error
