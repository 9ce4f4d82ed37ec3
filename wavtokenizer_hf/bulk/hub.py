"""Upload an output folder to the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..hub_errors import HTTP_ERROR
from .card import add_configs


def create_repo(name: str) -> None:
    """
    Create the dataset repository on the Hub if it does not exist.

    `tokenize` calls this before it encodes, so that a wrong name or token is reported early.
    """
    from huggingface_hub import HfApi

    _call_hub(name, lambda: HfApi().create_repo(name, repo_type="dataset", exist_ok=True))


def upload(folder: Path, name: str) -> None:
    """
    Upload an output folder, with `configs` added to the card.

    Files that the repository has already are not sent again.
    """
    from huggingface_hub import HfApi

    text = add_configs((folder / "README.md").read_text(encoding="utf-8", errors="surrogateescape"))
    _call_hub(
        name,
        lambda: HfApi().upload_folder(
            repo_id=name,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=["data/part-*.parquet", "manifest.json", "failures.jsonl"],
            commit_message="Codes by wavtokenizer_hf",
        ),
    )
    _call_hub(
        name,
        lambda: HfApi().upload_file(
            repo_id=name,
            repo_type="dataset",
            path_or_fileobj=text.encode(errors="surrogateescape"),
            path_in_repo="README.md",
            commit_message="Card by wavtokenizer_hf",
        ),
    )


def _call_hub(name: str, call: Callable[[], Any]) -> None:
    """Call a function of the Hub's client. Raises OSError with the dataset's name if it fails."""
    try:
        call()
    except (OSError, ValueError, HTTP_ERROR) as error:
        raise OSError(f"Cannot upload to the dataset {name!r} on the Hub: {error}") from error
