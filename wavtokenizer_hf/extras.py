"""Import the optional packages of the extras in pyproject.toml on first use. The core works without them."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from .limited_files import one_line


def require(name: str, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        name: Name of the module, such as `pyarrow.parquet`.
        extra: Extra of wavtokenizer_hf that installs the package.

    Raises:
        ImportError: The package is missing or cannot be imported. The message names the extra.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        reason = f" ({one_line(error)})" if _is_installed(package) else ""
        raise ImportError(f"This needs {package}: pip install 'wavtokenizer_hf[{extra}]'{reason}") from error


def _is_installed(package: str) -> bool:
    try:
        return sys.modules.get(package, package) is not None and find_spec(package) is not None
    except (ImportError, ValueError):
        return False
