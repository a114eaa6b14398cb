"""The main function of a service's process."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from avatar.errors import StageLost


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a service until it is stopped.

    Settings or a checkpoint that cannot be used, and a lost chain, end the process with one line and status 1.
    """
    try:
        asyncio.run(main())
    except (ValueError, StageLost) as error:
        sys.exit(f"error: {error}")
