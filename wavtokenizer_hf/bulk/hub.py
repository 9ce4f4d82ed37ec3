"""Upload an output folder to the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..hub_errors import HTTP_ERROR
from .card import add_configs


def prepare(name: str) -> None:
    """
    Make the dataset repository if there is none. It is done before the work, so that a name or token that is refused
    is met early.
    """
    from huggingface_hub import HfApi

    _say_what(name, lambda: HfApi().create_repo(name, repo_type="dataset", exist_ok=True))


def push(folder: Path, name: str) -> None:
    """Upload what is finished. Files that are there already are not sent again. The card gets its `configs`."""
    from huggingface_hub import HfApi

    text = add_configs((folder / "README.md").read_text(encoding="utf-8", errors="surrogateescape"))
    _say_what(
        name,
        lambda: HfApi().upload_folder(
            repo_id=name,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=["data/part-*.parquet", "manifest.json", "failures.jsonl"],
            commit_message="Codes by wavtokenizer_hf",
        ),
    )
    _say_what(
        name,
        lambda: HfApi().upload_file(
            repo_id=name,
            repo_type="dataset",
            path_or_fileobj=text.encode(errors="surrogateescape"),
            path_in_repo="README.md",
            commit_message="Card by wavtokenizer_hf",
        ),
    )


def _say_what(name: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except (OSError, ValueError, HTTP_ERROR) as error:
        raise OSError(f"Cannot upload to the dataset {name!r} on the Hub: {error}") from error
