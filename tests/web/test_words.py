"""Tests of web.words: no message to a person names a worker, a field or a status."""

import pytest

from avatar.client import Notice, NoticeKind
from avatar.errors import REASONS, AvatarError, InvalidField, NoCapacity, SessionNotFound, StageLost
from web.words import error_words, lag_words, notice_words

INTERNALS = ("worker", "stage", "vae", "denoiser", "picture:", "0af3", "block", "gateway", "device")


@pytest.mark.parametrize("error", REASONS.values())
def test_every_error_says_one_thing_to_do_and_no_internals(error: type[AvatarError]) -> None:
    words = error_words(error("vae: picture: block 3 of session 0af3 at this worker's device", retry_s=42.5))
    assert words.split(". ")[-1].split()[0] in {"Try", "Press", "Choose"}
    assert not [each for each in INTERNALS if each in words]


def test_a_full_deployment_says_when_to_try_again() -> None:
    assert error_words(NoCapacity("this worker's device has no time", retry_s=31.2)) == (
        "All places are taken. Try again in 32 seconds."
    )
    assert error_words(NoCapacity("all 2 streams of this worker are taken", retry_s=0.2)) == (
        "All places are taken. Try again in 10 seconds."
    )
    assert error_words(StageLost("vae: no worker answers")) == "The avatar has failed. Try again in 10 seconds."
    assert error_words(SessionNotFound("0af3")) == "The session has ended. Press Start for another one."


def test_a_refused_picture_keeps_its_fault() -> None:
    error = InvalidField.at("picture", "too small: 8x8, expected at least 16 pixels a side")
    assert "it is too small: 8x8, expected at least 16 pixels a side. Choose another one." in error_words(error)


@pytest.mark.parametrize("kind", NoticeKind)
def test_notices_have_words_of_their_own(kind: NoticeKind) -> None:
    words = notice_words(Notice(0, 0.0, kind, "the voice worker is gone", 0.0, 0, "STAGE_LOST"))
    if kind in (NoticeKind.UNKNOWN, NoticeKind.TOO_SLOW):
        assert words == "The voice worker is gone."
    else:
        assert "worker" not in words


def test_too_long_a_text_is_told_from_a_failed_voice() -> None:
    notice = Notice(0, 0.0, NoticeKind.TEXT_UNSPOKEN, "say.text: 20000 characters", 0.0, 0, "INVALID_TEXT")
    assert "too long" in notice_words(notice)


def test_a_lag_is_told_in_seconds_that_differ() -> None:
    assert "10 seconds of video in 13.6 seconds" in lag_words(0.7376)
    assert "10 seconds of video in 10.1 seconds" in lag_words(0.999)
    assert lag_words(1.0) == lag_words(3.0) == lag_words(0.0) == ""
