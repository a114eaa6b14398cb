"""How the process of a service runs."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from avatar.errors import StageLost


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a service until it is stopped.

    What cannot be used of its settings or checkpoint, or ends it before it is asked to, is told in one line.
    """
    try:
        asyncio.run(main())
    except (ValueError, StageLost) as error:
        sys.exit(f"error: {error}")
