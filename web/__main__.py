"""Serve a browser page for a gateway.

python -m web --target 127.0.0.1:7000 [--listen 127.0.0.1:8080] [--allow-host NAME] [--label]
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from avatar.client import AvatarError, channel_credentials, connect
from web.page_server import PageServer, portraits

ASSETS = Path(__file__).parents[1] / "assets"


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m web", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="127.0.0.1:7000", help="HOST:PORT of the gateway")
    parser.add_argument("--tls", nargs="?", const="", metavar="CA", help="use TLS; PEM file of a private authority")
    parser.add_argument("--token", default=os.environ.get("AVATAR_TOKEN", ""), help="bearer token; or AVATAR_TOKEN")
    parser.add_argument("--listen", default="127.0.0.1:8080", help="HOST:PORT to serve the page at")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="serve the page under this name, too"
    )
    parser.add_argument("--max-peers", type=int, default=4, help="sessions at a time")
    parser.add_argument("--label", action="store_true", help='draw "AI" into every frame')
    flags = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    host, _, port = flags.listen.rpartition(":")
    hosts = {host.strip("[]"), *flags.allow_host}
    task = asyncio.current_task()
    assert task
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # like ctrl-C
    credentials = None if flags.tls is None else channel_credentials(flags.tls)
    async with connect(flags.target, credentials=credentials, token=flags.token) as avatar:
        limits = await avatar.capabilities()
        server = PageServer(avatar, limits, portraits(ASSETS), flags.max_peers, hosts, label=flags.label)
        async with server.serving(host.strip("[]"), int(port)) as address:
            print(f"the page is at {address}", flush=True)
            await asyncio.Event().wait()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
    except (AvatarError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
