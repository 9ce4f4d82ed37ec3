"""Griffe extension: docstrings that a class assigns to a method, as `encode.__doc__ = ...`, which reading the source misses."""

import inspect

import griffe


METHODS = {"wavtokenizer_hf.modeling_wavtokenizer.WavTokenizerModel.encode"}


class RuntimeDocstrings(griffe.Extension):
    def on_function_instance(self, *, func: griffe.Function, **kwargs) -> None:
        if func.path in METHODS and func.docstring is None:
            docstring = inspect.getdoc(griffe.dynamic_import(func.path))
            func.docstring = griffe.Docstring(docstring, parent=func)
