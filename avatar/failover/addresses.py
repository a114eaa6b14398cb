"""The addresses of a pool's targets. Each name is resolved in a task of its own, so that none delays another."""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

logger = logging.getLogger(__name__)

RESOLVE_EVERY_S = 3.0
RESOLVE_S = 2.0


class Addresses:
    """Resolves targets, HOST:PORT or NAME:PORT.

    by_target: HOST:PORT of every address -> the target's name, which is empty if it is an address itself. A name that
    cannot be resolved keeps its addresses.
    """

    def __init__(self, targets: Sequence[str], on_change: Callable[[], None]) -> None:
        """on_change: called when addresses have changed."""
        self.by_target: dict[str, dict[str, str]] = {target: {} for target in targets}
        self._on_change = on_change
        self._failed: set[str] = set()

    async def resolve(self) -> None:
        """Resolve all targets once, at the same time."""
        await asyncio.gather(*(self._resolve(target) for target in self.by_target))

    def followers(self) -> list[Coroutine[Any, Any, None]]:
        """Return a coroutine for each name, which resolves it again for ever."""
        return [self._follow(target) for target in self.by_target if not _is_address(target)]

    async def _follow(self, target: str) -> None:
        while True:
            await asyncio.sleep(RESOLVE_EVERY_S)
            await self._resolve(target)

    async def _resolve(self, target: str) -> None:
        try:
            addresses = await _addresses(target)
        except OSError:
            if target not in self._failed:
                logger.warning("name not resolved; its workers are kept", extra={"target": target})
            self._failed.add(target)
            return
        if target in self._failed:
            logger.info("name resolved again", extra={"target": target})
            self._failed.discard(target)
        if addresses != self.by_target[target]:
            self.by_target[target] = addresses
            self._on_change()


def _host(target: str) -> str:
    return target.removeprefix("dns:///").rpartition(":")[0]


def _is_address(target: str) -> bool:
    try:
        ipaddress.ip_address(_host(target).strip("[]"))
    except ValueError:
        return False
    return True


async def _addresses(target: str) -> dict[str, str]:
    host, port = _host(target), target.rpartition(":")[2]
    if _is_address(target):
        return {f"{host}:{port}": ""}
    async with asyncio.timeout(RESOLVE_S):  # TimeoutError is an OSError
        found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    hosts = [f"[{where[0]}]" if family == socket.AF_INET6 else where[0] for family, *_, where in found]
    return {f"{each}:{port}": host for each in hosts}
