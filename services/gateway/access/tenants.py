"""Authentication: tenants, their bearer tokens, and the ids that belong to each.

The id of every session and reference begins with its tenant's prefix. An id with another prefix is answered like one
that does not exist, before anything is looked up: a caller cannot tell another tenant's session from a missing one.
"""

import hashlib
import logging
import re
import tomllib
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, fields
from hmac import compare_digest
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from avatar.errors import Unauthenticated
from avatar.settings import unusable
from avatar.store.claims import no_session
from avatar.store.references import no_reference

logger = logging.getLogger(__name__)

PREFIX_CHARS = 16
# A reference's id is a sha256 in hexadecimal; ids of sessions are shorter.
MAX_ID_CHARS = 64
# Services that need no token.
PUBLIC = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")
BEARER = "bearer "


@dataclass(frozen=True)
class Tenant:
    """An authenticated tenant, its quotas and its label; without a name, any caller, with no quotas.

    max_sessions: sessions at a time, each counted as long as its record exists.
    max_audio_s: seconds of audio in a day of UTC. max_references: stored references.
    label: all of its sessions show the label "AI".
    """

    name: str = ""
    max_sessions: int | None = None
    max_audio_s: float | None = None
    max_references: int | None = None
    label: bool = False

    @property
    def prefix(self) -> str:
        """The hexadecimal digits that ids of this tenant's sessions and references begin with."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:PREFIX_CHARS] if self.name else ""

    def session(self, session_id: str) -> str:
        """Return the id of a session. SessionNotFound if it cannot be this tenant's."""
        if not self._owns(session_id):
            raise no_session(session_id)
        return session_id

    def reference(self, reference_id: str) -> str:
        """Return the id of a reference. ReferenceNotFound if it cannot be this tenant's."""
        if not self._owns(reference_id):
            raise no_reference(reference_id)
        return reference_id

    def _owns(self, name: str) -> bool:
        return len(name) <= MAX_ID_CHARS and name.startswith(self.prefix)


ANYONE = Tenant()
_CALLER: ContextVar[Tenant] = ContextVar("caller", default=ANYONE)


def caller() -> Tenant:
    """Return the tenant whose call is being handled; ANYONE if there are no tenants."""
    return _CALLER.get()


class Tokens:
    """The tokens in a file and their tenants. The file is read again when it has changed.

    ValueError if it cannot be used at the start; later, the last usable content stays in force.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = self._file_version()
        self._tenants = read_tenants(path)

    def tenant(self, token: str) -> Tenant:
        """Return the tenant of a token. Unauthenticated if the token is unknown."""
        self._reload()
        given = hashlib.sha256(token.encode()).hexdigest()
        # Compare with all of them, each in constant time, so that the duration reveals nothing.
        found = [tenant for digest, tenant in self._tenants.items() if compare_digest(digest, given)]
        if not found:
            raise Unauthenticated("the bearer token is not known")
        return found[0]

    def _reload(self) -> None:
        if (version := self._file_version()) == self._version:
            return
        self._version = version
        try:
            self._tenants = read_tenants(self._path)
            logger.info("tenants read again", extra={"tokens": len(self._tenants)})
        except ValueError as error:
            logger.error("tenants not read again", extra={"problem": str(error)})

    def _file_version(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size


class Authentication(grpc.aio.ServerInterceptor):
    """Refuses calls without a known token, except for health and reflection, and sets the caller."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        # An unknown method needs no token: it must not become a label of metrics.
        if handler is not None and not handler_call_details.method.startswith(PUBLIC):
            # The handler runs in this task, so it sees the variable.
            _CALLER.set(self._tokens.tenant(_token(handler_call_details.invocation_metadata)))
        return handler


def _token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    values = [value for key, value in metadata if key == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str) or not values[0].lower().startswith(BEARER):
        raise Unauthenticated("the call needs metadata `authorization: Bearer TOKEN`")
    return values[0][len(BEARER) :]


def read_tenants(path: Path) -> dict[str, Tenant]:
    """Return the tenants by the sha256 of their tokens.

    ValueError if the file is malformed; docs/operations/security.md describes it.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unusable(path, f"a TOML file that can be read: {error}") from error
    tenants: dict[str, Tenant] = {}
    for name, table in tables.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or not isinstance(table, dict):
            raise _unusable(path, f"a table for each tenant, named by letters, digits, - and _; not {name!r}")
        tokens = table.pop("tokens", [])
        label = table.pop("label", False)
        if not isinstance(label, bool):
            raise _unusable(path, f"label of {name} as true or false")
        tenant = Tenant(name, label=label, **_quotas(path, name, table))
        for token in tokens if isinstance(tokens, list) else [tokens]:
            if not isinstance(token, str) or not re.fullmatch(r"[0-9a-f]{64}", token):
                raise _unusable(path, f"tokens of {name} as a list of sha256 digests, 64 hexadecimal digits each")
            if tenants.setdefault(token, tenant) is not tenant:
                raise _unusable(path, f"each token once; {name} and {tenants[token].name} share one")
    return tenants


def _quotas(path: Path, name: str, table: dict[str, Any]) -> dict[str, Any]:
    kinds = {each.name for each in fields(Tenant)} - {"name", "label"}
    for quota, value in table.items():
        if quota not in kinds or isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _unusable(path, f"of {name} tokens, label and whole numbers {', '.join(sorted(kinds))}; not {quota}")
    return table


def _unusable(path: Path, expected: str) -> ValueError:
    return unusable("tenants", str(path), expected)
