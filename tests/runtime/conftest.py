"""Fixtures of the runtime's tests."""

from collections.abc import Iterator

import pytest

from avatar.runtime.device_queue import DeviceQueue


@pytest.fixture
def queue() -> Iterator[DeviceQueue]:
    with DeviceQueue() as queue:
        yield queue
