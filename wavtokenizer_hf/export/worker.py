"""What the server of the worker processes imports before it forks them."""

import gc
from contextlib import suppress

from . import run
from .extra import import_optional


with suppress(ImportError):  # `export_tokens` says so before it starts a worker
    import_optional("pyarrow.parquet", "bulk")
gc.freeze()  # the garbage collector of a worker would write to all objects, and so copy the memory that it shares

__all__ = ["run"]
