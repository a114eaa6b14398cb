"""Tests of web.words: no message to a person names a worker, a field or a status."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from avatar.client import Notice, NoticeKind
from avatar.errors import REASONS, AvatarError, InvalidField, NoCapacity, SessionNotFound, StageLost
from avatar.vae import picture
from web.words import error_words, form_words, lag_words, notice_words, picture_words

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


def picture_refusals() -> list[str]:
    """Return the message of every ValueError that reading a picture raises, with 8 for each number in it."""
    found = []
    for path in Path(picture.__file__).parent.glob("*.py"):
        names = vars(import_module(f"{picture.__name__}.{path.stem}"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id="ValueError"), args=[ast.Constant(value=str(text))]):
                    found.append(text)
                case ast.Call(func=ast.Name(id="ValueError"), args=[ast.Name(id=name)]) if name in names:
                    found.append(names[name])
                case ast.Call(func=ast.Name(id="ValueError"), args=[ast.JoinedStr(values=parts)]):
                    found.append("".join(text_of(part, names) for part in parts))
    return found


def text_of(part: ast.expr, names: dict[str, object]) -> str:
    match part:
        case ast.Constant(value=text):
            return str(text)
        case ast.FormattedValue(value=ast.Name(id=name)):
            return str(names.get(name, 8))
    return "8"


REFUSALS = picture_refusals()


def test_the_refusals_of_pictures_are_found() -> None:
    assert len(REFUSALS) > 20
    for text in (
        "not a PNG, JPEG",
        "too small: 8x8",
        "damaged in",
        "damaged or",
        "more than 100 scans",
        "takes too long",
    ):
        assert [each for each in REFUSALS if each.startswith(text)], text


@pytest.mark.parametrize("refusal", REFUSALS)
def test_every_refusal_of_a_picture_is_put_in_words_for_a_person(refusal: str) -> None:
    words = picture_words(refusal)
    assert re.fullmatch(r"This picture cannot be used(: it (is|takes) [^;]+)?\. Choose another one\.", words)
    assert not re.search(r"\b(scans|decod\w+|MiB|memory|bytes|SIG\w+|rule|must|got)\b", words)
    is_about_the_request = re.search(" must | rule ", refusal)
    assert is_about_the_request or ": it " in words, "it says what is wrong"


def test_a_busy_picture_reader_is_not_a_lack_of_places() -> None:
    error = NoCapacity("vae: the machine is too busy to decode a picture; try again later", retry_s=1.0)
    expected = "The picture cannot be read, because the server is busy. Try again in 10 seconds."
    assert form_words(error) == expected
    assert form_words(StageLost("vae")) == error_words(StageLost("vae"))


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
