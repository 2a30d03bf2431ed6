"""Official checkpoints by name: a folder, or what the Hugging Face hub calls by that name, through the hub's own cache."""

import re
from pathlib import Path

from vtp.artefact import ArtefactError, siblings

FILES = ("config.json", "model.safetensors")
HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\S+))?")


def checkpoint_folder(name: str | Path) -> Path:
    """`name` itself when it exists or cannot be a hub id; else the folder of `org/name` or `org/name@revision`.

    Of a hub's repository no more than `FILES` are fetched, both of one commit; without a network those fetched before
    are used. A `Path` is never looked up. Raises ArtefactError that says why neither a folder nor the hub has it.
    """
    folder = Path(name)
    match = HUB_ID.fullmatch(name) if isinstance(name, str) else None
    if folder.exists() or match is None:
        return folder
    fetched = _fetch(match["id"], match["revision"])
    if missing := [file for file in FILES if not (fetched / file).is_file()]:
        raise ArtefactError(f"{name}: {missing[0]} is not in this repository of the hub: no checkpoint of VTP")
    return fetched


def _fetch(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import (
        FileMetadataError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    login = "log in with `hf auth login`"
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(FILES)))
    except RevisionNotFoundError:
        reason, remedy = f"has no revision {revision!r} of it", "look up its branches and tags there"
    except GatedRepoError:
        reason, remedy = "asks for a consent first", f"give it on its page and {login}"
    except RepositoryNotFoundError:
        reason, remedy = "has no such repository, or a private one", f"correct the name, or {login}"
    except HFValidationError:
        reason, remedy = "has no such names", "correct it"
    except (LocalEntryNotFoundError, FileMetadataError, HTTPError, ValueError) as error:  # also a proxy's own pages
        cause = _first_cause(error)
        if isinstance(cause, HfHubHTTPError):
            reason, remedy = f"answered {cause.response.status_code}", "try later"
        else:
            reason, remedy = f"cannot be reached ({_in_a_line(cause)})", "fetch it where there is a network"
    raise ArtefactError(
        f"{hub_id} is not a folder ({siblings(Path(hub_id))}), and the hub at {ENDPOINT} {reason}; "
        f"correct the path if you mean a folder; if you mean the hub, {remedy}"
    )


def _first_cause(error: BaseException) -> BaseException:
    from huggingface_hub.errors import HfHubHTTPError

    while not isinstance(error, HfHubHTTPError) and (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
