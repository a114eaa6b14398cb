"""Who calls: the tenants, the bearer tokens that stand for them, and the names that belong to each.

The name of every session and reference begins with its tenant's mark. A name with another mark is refused as one that
nobody has, before anything is looked up: what is another's cannot be told from what is not there.
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
from avatar.store.sessions import no_reference, no_session

logger = logging.getLogger(__name__)

MARK_CHARS = 16
# Of a reference: sha256 in hexadecimal. Sessions' are shorter.
MAX_NAME_CHARS = 64
# What may be called by everybody, beside nothing else.
OPEN = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")
BEARER = "bearer "


@dataclass(frozen=True)
class Tenant:
    """Whom a token stands for, and how much that may be; by default everybody, and without a bound.

    max_sessions: sessions at a time, each from its creation until its stream has ended. max_audio_s: seconds of sound
    in a day, by UTC. max_references: references that are kept.
    """

    name: str = ""
    max_sessions: int | None = None
    max_audio_s: float | None = None
    max_references: int | None = None

    @property
    def mark(self) -> str:
        """What the names of all that is this tenant's begin with: hexadecimal digits."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:MARK_CHARS] if self.name else ""

    def session(self, session_id: str) -> str:
        """The name of a session, which must be this tenant's. SessionNotFound if it cannot be."""
        if not self._owns(session_id):
            raise no_session(session_id)
        return session_id

    def reference(self, reference_id: str) -> str:
        """The same of a reference. ReferenceNotFound if it cannot be."""
        if not self._owns(reference_id):
            raise no_reference(reference_id)
        return reference_id

    def _owns(self, name: str) -> bool:
        return len(name) <= MAX_NAME_CHARS and name.startswith(self.mark)


EVERYBODY = Tenant()
_CALLER: ContextVar[Tenant] = ContextVar("caller", default=EVERYBODY)


def caller() -> Tenant:
    """Whose call is being handled; everybody's where there are no tenants."""
    return _CALLER.get()


class Tokens:
    """The tenants of a file by their tokens. The file is read again when it has changed.

    ValueError, at the start, if it cannot be used; later what was read last stays.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = self._seen()
        self._tenants = read_tenants(path)

    def tenant(self, token: str) -> Tenant:
        """Whom a token stands for. Unauthenticated if it is nobody."""
        self._read_again()
        given = _digest(token)
        # All are compared, and each in constant time: how long it takes says nothing about any.
        found = [tenant for digest, tenant in self._tenants.items() if compare_digest(digest, given)]
        if not found:
            raise Unauthenticated("the bearer token is not known")
        return found[0]

    def _read_again(self) -> None:
        if (state := self._seen()) == self._state:
            return
        self._state = state
        try:
            self._tenants = read_tenants(self._path)
            logger.info("tenants read again", extra={"tokens": len(self._tenants)})
        except ValueError as error:
            logger.error("tenants not read again", extra={"problem": str(error)})

    def _seen(self) -> tuple[int, int, int] | None:
        try:
            now = self._path.stat()
        except OSError:
            return None
        return now.st_mtime_ns, now.st_ino, now.st_size


class Authentication(grpc.aio.ServerInterceptor):
    """Lets only those call who have a token, except for health and reflection, and notes who it is."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        # A method that is not there is nobody's: it must not become a name among metrics.
        if handler is not None and not handler_call_details.method.startswith(OPEN):
            # The handler runs in this very task.
            _CALLER.set(self._tokens.tenant(_token(handler_call_details.invocation_metadata)))
        return handler


def _token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    values = [value for key, value in metadata if key == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str) or not values[0].lower().startswith(BEARER):
        raise Unauthenticated("the call needs metadata `authorization: Bearer TOKEN`")
    return values[0][len(BEARER) :]


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def read_tenants(path: Path) -> dict[str, Tenant]:
    """Tenants by the sha256 of their tokens. ValueError if the file is malformed (docs/operations/security.md)."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unusable(path, f"a TOML file that can be read: {error}") from error
    tenants: dict[str, Tenant] = {}
    for name, table in tables.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or not isinstance(table, dict):
            raise _unusable(path, f"a table for each tenant, named by letters, digits, - and _; not {name!r}")
        tokens = table.pop("tokens", [])
        tenant = Tenant(name, **_quotas(path, name, table))
        for token in tokens if isinstance(tokens, list) else [tokens]:
            if not isinstance(token, str) or not re.fullmatch(r"[0-9a-f]{64}", token):
                raise _unusable(path, f"tokens of {name} as a list of sha256 digests, 64 hexadecimal digits each")
            if tenants.setdefault(token, tenant) is not tenant:
                raise _unusable(path, f"each token once; {name} and {tenants[token].name} share one")
    return tenants


def _quotas(path: Path, name: str, table: dict[str, Any]) -> dict[str, Any]:
    kinds = {each.name for each in fields(Tenant)} - {"name"}
    for quota, value in table.items():
        if quota not in kinds or isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _unusable(path, f"of {name} tokens and whole numbers {', '.join(sorted(kinds))}; not {quota}")
    return table


def _unusable(path: Path, expected: str) -> ValueError:
    return unusable("tenants", str(path), expected)
