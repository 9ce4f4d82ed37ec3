"""Find a model by its name: `bundled`, a published checkpoint, a folder, or OWNER/NAME on the Hub.

A published checkpoint is converted on first use. The converted folder stays in the assets cache of huggingface_hub
(HF_ASSETS_CACHE, by default below HF_HOME). Later uses need no network.
"""

import difflib
import os
import sys
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path

from . import bundled_model
from .limited_files import one_line
from .progress import shown_progress


def find_model(name: str | os.PathLike, revision: str | None = None) -> str:
    """
    Return the folder or the name on the Hub that `from_pretrained` takes.

    Args:
        name: `bundled`, the name of a published checkpoint (see `wavtokenizer checkpoints`), a folder, or OWNER/NAME
            on the Hub. A folder has precedence over a published checkpoint of the same name.
        revision: Branch, tag or commit of a published checkpoint's repository. Default: main.

    Raises:
        ValueError: There is no such folder or checkpoint, or the checkpoint cannot be downloaded, verified or
            converted.
    """
    name = os.fspath(name)
    if name == "bundled":
        return str(bundled_model())
    if os.path.isdir(name):
        return name
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise ValueError(f"Cannot load the model {name!r}: there is no such folder.")
    if "/" in name:
        return name
    if name in (names := published_names()):
        return str(converted_model(name, revision))
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(nearest)}?" if nearest else "`wavtokenizer checkpoints` lists the names."
    raise ValueError(
        f"Cannot load the model {name!r}: there is no such folder, and no published checkpoint has this name. {hint} "
        "A model on the Hub is OWNER/NAME; bundled is the small model of this package."
    )


def find_torch_model(name: str | os.PathLike, revision: str | None = None) -> str:
    """Return the same as `find_model`. Also raises ValueError for a folder that `export-model` wrote."""
    folder = find_model(name, revision)
    if is_exported(folder):
        raise ValueError(
            f"{os.fspath(name)} is a folder of ONNX files. Only `wavtokenizer encode`, `decode` and `reconstruct` run "
            "them; everything else needs the torch model. Pass the model that was exported."
        )
    return folder


def is_exported(folder: str | os.PathLike) -> bool:
    """Return whether `export-model` wrote this folder."""
    from .export.wavtokenizer_onnx import CONFIG_NAME

    return Path(folder, CONFIG_NAME).is_file()


def published_names() -> list[str]:
    """Return the names of the published checkpoints."""
    from .conversion.published import table

    return list(table())


def converted_folder(name: str, revision: str | None = None) -> Path:
    """Return the cache folder of the converted copy of a published checkpoint, which need not exist."""
    from huggingface_hub import constants

    folder = name if revision is None else f"{name}@{revision.replace('/', '--')}"
    return Path(constants.HF_ASSETS_CACHE, "wavtokenizer_hf", "converted", folder)


def converted_model(name: str, revision: str | None = None) -> Path:
    """
    Return the folder of a published checkpoint; download, verify and convert it first if it is not in the cache.

    Standard error reports the download and the result. If several processes need the same checkpoint, one converts it
    and the others wait.

    Raises:
        ValueError: The checkpoint cannot be downloaded or verified, or the cache cannot be written.
    """
    folder = converted_folder(name, revision)
    if (folder / "config.json").is_file():  # the folder is complete, because it appears at once
        return folder

    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    from .conversion.download import download
    from .conversion.from_original import convert
    from .conversion.published import find

    published = find(name)
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(folder.with_name(f"{folder.name}.lock")))
        except OSError as error:
            raise ValueError(
                f"Cannot load the model {name!r}: the cache {folder.parent} cannot be written "
                f"({error.strerror or error}). Set HF_HOME to another folder, or run `wavtokenizer convert "
                f"--checkpoint {name} -o FOLDER` and pass FOLDER as the model."
            ) from error
        if (folder / "config.json").is_file():  # another process converted it
            return folder
        if published.repository is not None and not constants.HF_HUB_OFFLINE:
            source = f"{published.file} of {published.repository}"
            print(f"{name}: first use: downloading {source}, then converting it", file=sys.stderr)
        try:
            path = download(published, revision)
            with redirect_stdout(StringIO()), shown_progress("steps") as show:  # hides the report of `convert`
                convert(path, folder, published=published, on_progress=show)
        except (OSError, ValueError) as error:
            raise ValueError(f"Cannot load the model {name!r}: {one_line(error)}") from error
        print(f"{name}: verified and converted. It is loaded from {folder} from now on", file=sys.stderr)
    return folder
