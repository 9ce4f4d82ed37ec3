"""What the server of the worker processes imports before it forks them."""

import gc
from contextlib import suppress

from ..extras import require
from . import run


with suppress(ImportError):  # `export_tokens` says so before it starts a worker
    # the first use of a table imports the latter two
    for name in ("pyarrow.parquet", "pyarrow.compute", "pandas"):
        require(name, "bulk")
gc.freeze()  # the garbage collector of a worker would write to all objects, and so copy the memory that it shares

__all__ = ["run"]
