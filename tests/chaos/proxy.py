"""A connection that can be cut, or swallow all that is sent over it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Proxy:
    """Passes bytes on between whoever connects to `target` and the server behind it. Made by `proxied`.

    target: HOST:PORT to connect to.
    """

    def __init__(self, behind: str) -> None:
        self.target = ""
        self._host, _, self._port = behind.rpartition(":")
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_passing = asyncio.Event()
        self._is_passing.set()

    def cut(self) -> None:
        """Break all connections, as the kernel does when a process is killed; others may be made."""
        for writer in [*self._writers]:
            self._end(writer)

    def swallow(self) -> None:
        """Pass nothing on, and tell nobody: a network that loses all packets."""
        self._is_passing.clear()

    def mend(self) -> None:
        """Pass everything on again. Connections that have lost something are of no use any more."""
        self.cut()
        self._is_passing.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Be one connection until either end closes it."""
        self._writers.add(writer)
        try:
            await self._is_passing.wait()
            inner_reader, inner_writer = await asyncio.open_connection(self._host, int(self._port))
            self._writers.add(inner_writer)
            await asyncio.gather(self._pump(reader, inner_writer), self._pump(inner_reader, writer))
        except OSError:
            self._end(writer)  # nobody listens there

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes on; where one end is gone, so is the other."""
        try:
            while data := await reader.read(1 << 16):
                if self._is_passing.is_set():
                    writer.write(data)
                    await writer.drain()
        except OSError:
            pass
        finally:
            self._end(writer)

    def _end(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.transport.abort()


@asynccontextmanager
async def proxied(behind: str) -> AsyncGenerator[Proxy, None]:
    """A proxy in front of the server at HOST:PORT while the body runs."""
    proxy = Proxy(behind)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    _, port = server.sockets[0].getsockname()
    proxy.target = f"127.0.0.1:{port}"
    try:
        yield proxy
    finally:
        server.close()
        proxy.mend()
        await server.wait_closed()
