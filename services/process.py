"""The main function of a service's process."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from avatar.errors import StageLost

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
    try:
        asyncio.run(main(*chosen))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except StageLost as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        logging.shutdown()
        os._exit(1)  # torch's own end of the process may wait for the lost peer
