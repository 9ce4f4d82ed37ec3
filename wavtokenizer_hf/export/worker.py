"""Import the modules that the worker processes share, before their fork server forks them."""

import gc
from contextlib import suppress

from ..extras import require
from . import run


with suppress(ImportError):  # `export_tokens` has raised this error before it starts a worker
    # without this, the first use of a table in each worker imports the last two
    for name in ("pyarrow.parquet", "pyarrow.compute", "pandas"):
        require(name, "bulk")
gc.freeze()  # else a worker's garbage collector writes to all objects, which copies their shared memory pages

__all__ = ["run"]
