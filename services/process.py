"""The main function of a service's process."""

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from avatar.errors import StageLost

DESCRIPTION = (
    "Run until SIGTERM or SIGINT. There are no arguments: settings are environment variables, AVATAR_*, which are "
    "listed in docs/operations/settings.md."
)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a service until it is stopped.

    Arguments of the command line are refused with status 2, and `-h` or `--help` print the usage. Settings or a
    checkpoint that cannot be used, and a lost chain, end the process with one line and status 1.
    """
    module = sys.modules["__main__"].__spec__
    prog = f"python -m {module.name.removesuffix('.__main__')}" if module else None
    argparse.ArgumentParser(prog, description=DESCRIPTION).parse_args()
    try:
        asyncio.run(main())
    except (ValueError, StageLost) as error:
        sys.exit(f"error: {error}")
