"""What the hub's client raises -> one line that says what is wrong and how to mend it. For models and for data sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from minillm.errors import MinillmError


def network_errors() -> tuple[type[Exception], ...]:
    """What the client raises without a network: its own error's bases are its HTTP library's, which it has changed
    twice (requests, httpx, httpx2)."""
    from huggingface_hub.utils import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError)


@contextmanager
def one_line_errors(name: str, revision: str | None, kind: type[MinillmError]) -> Iterator[None]:
    """Raise `kind` where the client, asked in the block about the repository `name`, raises one of its own errors."""
    from huggingface_hub.utils import HFValidationError

    try:
        yield
    except HFValidationError:
        raise kind(f"{name}: no such folder, and no valid hub id; an id looks like owner/name") from None
    except network_errors() as error:
        raise kind(f"{name}: {_reason(error, name, revision)}") from None


def _reason(error: Exception, name: str, revision: str | None) -> str:
    from huggingface_hub import constants, utils

    if isinstance(error, utils.GatedRepoError):
        return (
            f"is gated; accept its terms at {constants.ENDPOINT}/{name} and log in with `hf auth login` "
            "(or set HF_TOKEN)"
        )
    if isinstance(error, utils.RevisionNotFoundError):
        return f"has no revision {revision!r} on the hub; leave it out for the main branch"
    if isinstance(error, utils.RepositoryNotFoundError):
        return "no such folder, and no such repository on the hub (or it is private: `hf auth login`); check the name"
    # A refusal comes wrapped in "not in the cache either".
    status = getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"the hub refuses access ({status}); check your token with `hf auth whoami`, renew it with `hf auth login`"
        )
    if isinstance(error, utils.LocalEntryNotFoundError):
        return "the hub cannot be reached and the cache does not hold (all of) it; go online, or give a folder"
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"could not be fetched ({first_line}); try again, the files already there are kept"
