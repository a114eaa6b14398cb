"""A TCP proxy whose connections can be broken, or blocked without a sign to either end."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Proxy:
    """Forwards bytes between its clients and a server. Opened by `proxied`.

    target: HOST:PORT that clients connect to.
    """

    def __init__(self, server: str) -> None:
        self.target = ""
        self._host, _, self._port = server.rpartition(":")
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_refusing = False
        self._is_forwarding = asyncio.Event()
        self._is_forwarding.set()

    def cut(self) -> None:
        """Break all connections, as the kernel does when a process is killed; clients may connect again."""
        for writer in [*self._writers]:
            self._end(writer)

    def leave(self) -> None:
        """Break all connections and refuse new ones, like a machine without the server."""
        self._is_refusing = True
        self.cut()

    def swallow(self) -> None:
        """Drop all bytes and keep the connections open, like a network that loses all packets."""
        self._is_forwarding.clear()

    def mend(self) -> None:
        """Forward again. Breaks the connections, since they have lost bytes."""
        self.cut()
        self._is_refusing = False
        self._is_forwarding.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one connection until either end closes it."""
        if self._is_refusing:
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            await self._is_forwarding.wait()
            inner_reader, inner_writer = await asyncio.open_connection(self._host, int(self._port))
            self._writers.add(inner_writer)
            await asyncio.gather(self._pump(reader, inner_writer), self._pump(inner_reader, writer))
        except OSError:
            self._end(writer)  # the server is not running

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward bytes in one direction; close the other end when one end closes."""
        try:
            while data := await reader.read(1 << 16):
                if self._is_forwarding.is_set():
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
async def proxied(server: str) -> AsyncGenerator[Proxy, None]:
    """Run a proxy of the server at HOST:PORT while the body runs."""
    proxy = Proxy(server)
    listener = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    _, port = listener.sockets[0].getsockname()
    proxy.target = f"127.0.0.1:{port}"
    try:
        yield proxy
    finally:
        # Python 3.11 leaves a connection open that is accepted in the moment before its listener closes.
        for listening in listener.sockets:
            asyncio.get_running_loop().remove_reader(listening)
        proxy.mend()
        proxy.leave()
        await asyncio.sleep(0)
        listener.close()
        await listener.wait_closed()
