"""The cell of a gateway: calls that are passed on to its other gateways, and its drain.

A claim names the gateway and the cell where its session streams. A call is passed on once, with its caller's own token
and within half of the time that is left to its caller. Where it cannot be passed on, the error says where to send it.

A drained cell opens no new streams and keeps those that are open, or are resumed, to their end. Health checks of the
public service then answer NOT_SERVING, so that a router sends new sessions elsewhere:

    python -m services.gateway.cell drain NAME      also `undrain`, `show`; AVATAR_REDIS_URL names the Redis server
"""

import argparse
import asyncio
import logging
import os
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2

from avatar.aio import Attempts, background
from avatar.errors import AvatarError, Draining, NotStreaming, StoreUnavailable
from avatar.rpc.channel import channel
from avatar.rpc.interceptor import Context
from avatar.rpc.status import error_details, error_of
from avatar.rpc.tls import peer_credentials
from avatar.settings import GatewaySettings, load
from avatar.store.claims import Place
from avatar.store.redis import RedisHashes
from avatar.store.registry import WorkerRegistry
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

SERVICE = "avatar.v1.AvatarService"
# Reads of whether the cell is drained, and the time after which a refused client comes again, in seconds.
READ_EVERY_S = 1.0
RETRY_S = 1.0, 3.0
# Metadata of a call that was passed on.
FORWARDED = "avatar-forwarded"
# Limit on a call that is passed on, and on its share of the time until the caller's deadline: from a gateway that does
# not answer, the caller gets an error in time.
FORWARD_S, FORWARD_SHARE = 1.5, 0.5


class Cell:
    """The cell of this gateway.

    here: where sessions of this gateway stream, once it serves; its address is empty before. is_drained: as of the last
    read. checks: health checks, which a drain changes.
    """

    def __init__(self, settings: GatewaySettings, registry: WorkerRegistry) -> None:
        self.here = Place("", settings.cell)
        self.is_drained = False
        self.checks = health.aio.HealthServicer()
        self._settings = settings
        self._registry = registry
        peer_credentials(settings.tls_cert, settings.tls_key)  # fail at the start, and not at the first call

    def check_not_drained(self) -> None:
        """Raise Draining if the cell opens no new streams."""
        if self.is_drained:
            message = f"cell {self.here.cell} is drained: it opens no new streams"
            raise Draining(message, metadata={"cell": self.here.cell}, retry_s=random.uniform(*RETRY_S))

    async def read(self) -> None:
        """Read whether the cell is drained. Without the store, it stays as it was.

        A drained cell stays so, too, if the store loses its data.
        """
        was_drained = self.is_drained
        with suppress(StoreUnavailable):
            self.is_drained = await self._registry.is_drained(was_drained=was_drained)
        if self.is_drained != was_drained:
            logger.warning("cell drained" if self.is_drained else "cell undrained", extra={"cell": self.here.cell})
            await self.report_health()

    async def report_health(self) -> None:
        """Set the health of the public service."""
        status = health_pb2.HealthCheckResponse
        await self.checks.set(SERVICE, status.NOT_SERVING if self.is_drained else status.SERVING)

    @asynccontextmanager
    async def serving(self, address: str) -> AsyncGenerator[None, None]:
        """Follow the cell's drain while the body runs. address: at which other gateways reach this one."""
        self.here = Place(address, self.here.cell)
        await self.report_health()
        async with background(self._read_forever()):
            yield

    async def _read_forever(self) -> None:
        attempts = Attempts(logger, "drain of the cell not read", "drain of the cell read again", cell=self.here.cell)
        while True:
            await asyncio.sleep(READ_EVERY_S)
            with attempts:
                await self.read()

    async def forward(self, method: str, request: Message, place: Place | None, context: Context) -> Any:
        """Return another gateway's response to a unary call about a session; raise the error that it ends with.

        place: where the session streams, None for nowhere. NotStreaming if the call cannot be passed on there; its
        metadata `gateway` and `cell` say where it can be sent.
        """
        if place is None:
            raise NotStreaming("no stream of this session is open")
        given = dict(context.invocation_metadata() or ())
        if place.cell != self.here.cell or FORWARDED in given or place.gateway in ("", self.here.gateway):
            raise _elsewhere(place)
        token = [("authorization", given["authorization"])] if "authorization" in given else []
        remaining_s = context.time_remaining()
        timeout_s = FORWARD_S if remaining_s is None else min(FORWARD_S, FORWARD_SHARE * remaining_s)
        try:
            credentials = peer_credentials(self._settings.tls_cert, self._settings.tls_key)
        except ValueError as error:  # the files are being replaced
            raise _elsewhere(place) from error
        async with channel(place.gateway, credentials) as connection:
            call = getattr(pb_grpc.AvatarServiceStub(connection), method)
            try:
                return await call(request, metadata=[(FORWARDED, "1"), *token], timeout=timeout_s)
            except grpc.aio.AioRpcError as error:
                if error_details(error).reason:
                    raise error_of(error) from error
                raise _elsewhere(place) from error  # it is gone or frozen, or its certificate is not for its address


def _elsewhere(place: Place) -> NotStreaming:
    where = f"gateway {place.gateway or 'without an address'} of cell {place.cell}"
    message = f"the session streams at {where}; send the call there"
    return NotStreaming(message, metadata={"gateway": place.gateway, "cell": place.cell})


async def _run(command: str, cell: str) -> None:
    """Run a command, and print the cell's state."""
    store = SessionStore(RedisHashes(load(GatewaySettings, os.environ).redis_url))
    registry = store.workers(cell)
    try:
        if command != "show":
            await registry.set_drained(is_drained=command == "drain")
        state = "drained" if await registry.is_drained() else "open"
        num_workers = len((await registry.read()).workers)
        workers = f"{num_workers} workers" if num_workers else "no workers (does any process have this cell name?)"
        print(f"cell {cell}: {state}, {workers}")
    finally:
        await store.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m services.gateway.cell", description="Drain a cell.")
    parser.add_argument("command", choices=("drain", "undrain", "show"))
    parser.add_argument("cell", help="its name: AVATAR_CELL of its processes")
    flags = parser.parse_args()
    try:
        asyncio.run(_run(flags.command, flags.cell))
    except StoreUnavailable as error:
        parser.exit(1, f"{error}; is AVATAR_REDIS_URL the Redis server of the cell?\n")
    except (AvatarError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
