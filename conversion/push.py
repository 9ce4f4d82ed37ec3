"""The way of a converted folder to the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from .download import HTTP_ERROR


def prepare(name: str, private: bool = False) -> None:
    """
    Makes the repository if there is none; done before the work, so that a name or token that is refused is met early.

    Raises:
        OSError: the Hub refuses it, or cannot be reached.
    """
    _say_what(name, lambda: HfApi().create_repo(name, private=private or None, exist_ok=True))


def push(folder: Path, name: str, create_pr: bool = False) -> str:
    """
    Uploads all files of a folder in one commit, and asks the Hub whether they are there.

    Args:
        folder: made by `convert`; it stays as it is.
        name: of the repository, which exists.
        create_pr: propose the files as a pull request instead of putting them onto the main branch.

    Returns:
        The address of the commit or pull request.

    Raises:
        OSError: the Hub refuses the files, or the connection broke; the same call again finishes it.
    """
    api = HfApi()
    commit = _say_what(
        name,
        lambda: api.upload_folder(
            repo_id=name, folder_path=folder, create_pr=create_pr, commit_message="WavTokenizer, by wavtokenizer_hf"
        ),
        f" {folder} is complete, run this again to go on.",
    )
    revision = commit.pr_revision if create_pr else commit.oid
    there = set(_say_what(name, lambda: api.list_repo_files(name, revision=revision)))
    missing = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - there
    if missing:
        raise OSError(f"{name} lacks {', '.join(sorted(missing))} after the upload. Run this again.")
    return commit.pr_url if create_pr else commit.commit_url


def _say_what(name: str, call: Callable[[], Any], next_step: str = "") -> Any:
    try:
        return call()
    except (
        OSError,
        ValueError,
        RuntimeError,
        HTTP_ERROR,
    ) as error:  # hf_xet, which moves large files, raises RuntimeError
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            next_step = f" Log in with `hf auth login`, or set HF_TOKEN.{next_step}"
        elif status == 403:
            next_step = (
                " Use a token that may write there, choose another name, or propose the files with --create-pr where the "
                f"repository exists.{next_step}"
            )
        raise OSError(f"Cannot upload to {name!r} on the Hub: {' '.join(str(error).split())}.{next_step}") from error
