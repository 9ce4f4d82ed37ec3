"""The way of a folder to the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def prepare(name: str) -> None:
    """Makes the dataset repository if there is none. Done before the work, so that a name or token that is refused is met early."""
    from huggingface_hub import HfApi

    _say_what(name, lambda: HfApi().create_repo(name, repo_type="dataset", exist_ok=True))


def push(folder: Path, name: str) -> None:
    """Uploads what is finished; files that are there already are not sent again."""
    from huggingface_hub import HfApi

    _say_what(
        name,
        lambda: HfApi().upload_folder(
            repo_id=name,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=["data/part-*.parquet", "manifest.json", "failures.jsonl", "README.md"],
            commit_message="Tokens by wavtokenizer_hf",
        ),
    )


def _say_what(name: str, call: Callable[[], Any]) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    http_error = HfHubHTTPError.__bases__[0]  # HTTPError of httpx, or of httpx2 from huggingface_hub 2.4 on
    try:
        call()
    except (OSError, ValueError, http_error) as error:
        raise OSError(f"Cannot upload to the dataset {name!r} on the Hub: {error}") from error
