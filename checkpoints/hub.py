"""Model repositories of the Hugging Face Hub: one snapshot, only the files that are read.

The library's own cache (HF_HOME) and progress bar are used; a repository that is already there needs no
network.
"""

from __future__ import annotations

from pathlib import Path

from ..proto.errors import CheckpointError
from .directory import PATTERNS
from .model_files import Progress


def fetch_snapshot(name: str, progress: Progress) -> Path:
    """The local directory of `org/name` or `org/name@revision`, downloaded when it is not there yet.

    Raises:
        CheckpointError: no such repository or revision, no access, no network and nothing cached, or no room.
    """
    # Imported here: it takes a quarter of a second, and most models are local.
    from huggingface_hub import errors, snapshot_download

    repo_id, _, revision = name.partition("@")
    progress(f"fetching {name}", 0.0)
    try:
        path = snapshot_download(repo_id, revision=revision or None, allow_patterns=list(PATTERNS))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id} needs permission: accept its terms on its page on the Hub, "
            "then run `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} is neither a directory here nor a repository on the Hub; "
            "check the name, and if it is private run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} has no revision {revision!r}; name a branch, a tag or a commit"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is no name that a repository can have: {error}") from error
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.IncompleteSnapshotError,
    ) as error:
        raise CheckpointError(
            f"{name} is not in the local Hub cache and the Hub cannot be reached ({_first_line(error)}); "
            "connect to the network and unset HF_HUB_OFFLINE, or name a model directory or a .gguf file"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{name} could not be fetched from the Hub: {_first_line(error)}") from error
    progress(f"fetching {name}", 1.0)
    return Path(path)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
