"""No test of the gateway may leave a session's id in a log: anyone who has it can stream."""

from collections.abc import Iterator

import pytest

from avatar import telemetry


@pytest.fixture(autouse=True)
def no_session_id_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level("INFO"):
        yield
    for record in caplog.get_records("call"):
        text = f"{record.getMessage()} {vars(record)} {caplog.handler.format(record)}"
        assert telemetry.without_session_ids(text) == text
