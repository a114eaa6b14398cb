"""The main function of a service's process."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from avatar import telemetry
from avatar.errors import StageLost

# Longest time to export what telemetry still has, at the end of a process.
EXPORT_S = 1.0
DESCRIPTION = (
    "Run until SIGTERM or SIGINT. Settings are environment variables, AVATAR_*, which are listed in "
    "docs/operations/settings.md."
)


def run(main: Callable[..., Coroutine[Any, Any, None]], services: Collection[str] = ()) -> None:
    """Run a service until it is stopped.

    services: that the command line may name; `main` gets the chosen ones, at least one, in its order. Without any the
    command line has no arguments. Others are refused with status 2, and `-h` or `--help` print the usage. Settings or a
    checkpoint that cannot be used, and a lost chain, end the process with one line and status 1.
    """
    module = sys.modules["__main__"].__spec__
    prog = f"python -m {module.name.removesuffix('.__main__')}" if module else None
    parser = argparse.ArgumentParser(prog, description=DESCRIPTION)
    if services:
        parser.add_argument("services", nargs="+", choices=services, metavar="SERVICE", help=", ".join(services))
    chosen = vars(parser.parse_args()).values()
    status = 0
    try:
        asyncio.run(main(*chosen))
        telemetry.shut_down(EXPORT_S)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except StageLost as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is closed. The interpreter's own end takes up to a second of CPU time with torch, which is many seconds on a
    # busy machine, and may wait for a lost peer.
    os._exit(status)
