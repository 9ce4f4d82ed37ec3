"""Download a published checkpoint with huggingface_hub. Cache, offline mode and tokens work as usual."""

from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..hub_errors import HTTP_ERROR
from .published import PublishedCheckpoint


def download(
    published: PublishedCheckpoint,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """
    Return the path of a published file, downloaded if it is not in the cache.

    A cached file needs no network, and may be gone from the Hub. An interrupted download is resumed a few times.

    Args:
        published: Entry of the checkpoint, from `published.find`.
        revision: Branch, tag or commit of its repository. Defaults to main.
        token: Access token of the Hub. Defaults to the one of `hf auth login` or HF_TOKEN.
        cache_dir: Cache folder. Defaults to that of huggingface_hub.

    Raises:
        ValueError: The checkpoint is no longer on the Hub.
        OSError: The Hub cannot be reached, access is denied, the revision does not exist, or the repository is empty
            or gone.
    """
    name, repository, file = published.name, published.repository, published.file
    copy_hint = f"`wavtokenizer convert FILE --checkpoint {name}` converts a copy that you have."
    if repository is None:
        raise ValueError(f"{name} ({file}) is no longer on the Hub. {copy_hint}")
    where = f"{repository} on the Hub"
    try:
        return Path(hf_hub_download(repository, file, revision=revision, token=token, cache_dir=cache_dir))
    except GatedRepoError as error:
        raise OSError(
            f"{where} requires you to accept its terms. Accept them on its page, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"There is no {where}: it is gone, or you have no access. If it is private, log in with `hf auth login`. "
            f"{copy_hint}"
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(
            f"{where} has no revision {revision!r}. Name one of its branches, tags or commits, or leave it out."
        ) from error
    except LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError, so it comes first
        reason = "offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise OSError(
            f"{name} ({file}) is not in the cache, and {reason}. Go online and run this again. {copy_hint}"
        ) from error
    except EntryNotFoundError as error:
        raise OSError(f"{where} holds no {file}: it was emptied or renamed. {copy_hint}") from error
    except (HTTP_ERROR, OSError) as error:
        raise OSError(f"{name} ({file}) could not be downloaded: {error}. Run this again.") from error
