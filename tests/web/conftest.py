"""The page over the stand-in gateway, or over the running one that `--target` names."""

from collections.abc import AsyncGenerator

import pytest

from avatar.store.sessions import SessionStore
from tests.web.page import Page, serving


@pytest.fixture
async def page(store: SessionStore, pytestconfig: pytest.Config) -> AsyncGenerator[Page, None]:
    async with serving(store, pytestconfig.getoption("--target")) as page:
        yield page
