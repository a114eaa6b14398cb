"""Tests of avatar.errors."""

import re
from pathlib import Path

import pytest

from avatar.errors import DOMAIN, REASONS, AvatarError, InvalidAudio, InvalidField

CONTRACT = Path(__file__).parents[1] / "protos" / "avatar" / "v1" / "avatar_service.proto"


def test_the_contract_lists_every_reason_with_its_status() -> None:
    rows = re.findall(r"^//     ([A-Z_]+) +([A-Z_]+) {2,}\S", CONTRACT.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == {reason: error.code.name for reason, error in REASONS.items()}
    assert len(rows) == len(REASONS)


def test_the_contract_names_the_domain() -> None:
    assert f"ErrorInfo of the domain `{DOMAIN}`" in CONTRACT.read_text(encoding="utf-8")


@pytest.mark.parametrize("reason", REASONS)
def test_a_reason_has_the_format_of_googles_api_guide(reason: str) -> None:
    assert re.fullmatch(r"[A-Z][A-Z0-9_]{1,61}[A-Z0-9]", reason)


@pytest.mark.parametrize("error", REASONS.values())
def test_an_error_carries_its_details(error: type[AvatarError]) -> None:
    raised = error("the disk is full", metadata={"stage": "vae"}, violations=(("seed", "too large"),), retry_s=2.0)
    assert str(raised) == raised.message == "the disk is full"
    assert raised.metadata == {"stage": "vae"}
    assert raised.violations == (("seed", "too large"),)
    assert raised.retry_s == 2.0


@pytest.mark.parametrize("error", [InvalidField, InvalidAudio])
def test_an_invalid_field_is_named(error: type[InvalidField]) -> None:
    raised = error.at("open.audio.rate_hz", "3000 Hz, expected 8000 to 48000")
    assert type(raised) is error
    assert str(raised) == "open.audio.rate_hz: 3000 Hz, expected 8000 to 48000"
    assert raised.violations == (("open.audio.rate_hz", "3000 Hz, expected 8000 to 48000"),)
