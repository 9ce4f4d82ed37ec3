"""Upload a converted folder to the Hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token

from ..hub_errors import HTTP_ERROR


OPTIONAL_FILES = ("discriminators.safetensors",)  # written by some conversions only


def check_logged_in() -> None:
    """Raise OSError if there is no access token. Call it before the conversion starts."""
    if get_token() is None:
        raise OSError(
            "Got a name on the Hub, but no token for the upload. Log in with `hf auth login`, or set HF_TOKEN."
        )


def push(folder: Path, name: str, private: bool = False, create_pr: bool = False) -> str:
    """
    Upload all files of a folder in one commit, and check that the Hub has them.

    The same commit deletes the optional files of an earlier conversion that this folder lacks. All other files stay.
    The repository is created here, so a failed conversion leaves no empty repository.

    Args:
        folder: Folder that `convert` wrote. It is not changed.
        name: Name of the repository. It is created if it does not exist.
        private: Create the repository as private. A public repository that exists is refused.
        create_pr: Upload the files as a pull request instead of to the main branch.

    Returns:
        URL of the commit or pull request.

    Raises:
        OSError: The Hub refuses the name or the files, the repository is public although `private` was asked for, or
            the connection broke. The same call again finishes the upload.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise OSError(
                f"{name} exists and is public, expected a private one. Make it private in its settings, choose "
                "another name, or leave --private out"
            )
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            create_pr=create_pr,
            commit_message="WavTokenizer, by wavtokenizer_hf",
            delete_patterns=[file for file in OPTIONAL_FILES if not (folder / file).is_file()],
        )
        revision = commit.pr_revision or commit.oid  # the Hub opens no pull request without changes
        uploaded = set(api.list_repo_files(name, revision=revision))
    except (OSError, ValueError, RuntimeError, HTTP_ERROR) as error:  # hf_xet raises RuntimeError
        reason = " ".join(str(error).split())
        raise OSError(
            f"Cannot upload to {name!r} on the Hub: {reason}.{_advice(error)} {folder} is complete: run this again "
            "to continue."
        ) from error
    missing = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - uploaded
    if missing:
        raise OSError(f"{name} lacks {', '.join(sorted(missing))} after the upload. Run this again.")
    return commit.pr_url or commit.commit_url


def _advice(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return " Log in with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return (
            " Use a token with write access, choose another name, or propose the files with --create-pr if the "
            "repository exists."
        )
    return ""
