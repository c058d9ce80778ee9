"""Exported folders as model repositories of the Hugging Face Hub, or of the server that HF_ENDPOINT names.

The token is huggingface_hub's: HF_TOKEN, or the one that `hf auth login` saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import UserError, one_line

try:
    import httpx2
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported at run time alone
except ImportError as error:
    raise UserError(f"--push-to-hub: {error}; run pip install 'iwm[hub]'") from error


class HubError(UserError):
    """Refused or failed upload; the message names the repository and the remedy."""


def full_name(name: str) -> str:
    """Return NAMESPACE/NAME of a repository, with the user's namespace where the name has none.

    Raises HubError for an invalid name, without a valid token, and without a connection.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HubError(f"--push-to-hub {name}: {one_line(error)}; give NAMESPACE/NAME") from error
    if get_token() is None:
        raise HubError(f"--push-to-hub {name}: there is no token; run hf auth login, or set HF_TOKEN")
    with _errors_of(name):
        user = HfApi().whoami()["name"]
    return name if "/" in name else f"{user}/{name}"


def push(folder: Path, name: str, private: bool) -> str:
    """Create the repository where it does not exist, and commit all files of the folder. Return its address.

    private: a new repository is private; an existing one keeps its visibility. False: the default of the namespace.
    Raises HubError.
    """
    with _errors_of(name):
        api = HfApi()
        address = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload {folder.name}")
    return str(address)


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Raise what the Hub answers as HubError."""
    try:
        yield
    except HfHubHTTPError as error:
        raise HubError(f"--push-to-hub {name}: {_remedy(error)}") from error
    except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
        raise HubError(
            f"--push-to-hub {name}: {HfApi().endpoint} was not reached ({one_line(error)}); check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE, and run the command again"
        ) from error


def _remedy(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return "the token was refused (401); run hf auth login with a valid one, or set HF_TOKEN"
    if status == 403:
        return "the token may not write there (403); use a token with write access to this namespace"
    return f"the server answered {status} ({error.server_message or one_line(error)}); correct the name or try again"
