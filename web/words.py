"""Errors and notices of the gateway in words for a person at the page: what is wrong, and one thing to do about it.

The gateway's own messages name workers, fields and limits; they are for those who write a client.
"""

import math
import re

from avatar.client import AvatarError, Notice, NoticeKind
from avatar.errors import (
    ConnectionLost,
    Draining,
    InvalidField,
    InvalidText,
    MessageTooLarge,
    NoCapacity,
    QuotaExceeded,
    SessionClosed,
    SessionNotFound,
    SilentClient,
    SlowReader,
)

# Shortest time after which a visitor is asked to try again.
RETRY_S = 10.0
ENDED = "The session has ended. Press Start for another one."
NOTICES = {
    NoticeKind.DEGRADED: "The picture lags, because the server or the connection is busy. Wait until it has caught up.",
    NoticeKind.GOING_AWAY: "The server stops soon. Press Leave, then Start, to go on.",
    NoticeKind.AUDIO_REFUSED: "More speech came than can wait, and a part of it was dropped. Send less at a time.",
    NoticeKind.SLOW_READER: "This browser does not keep up with the video. Close other pages.",
}
# By a part of the refusal. Other refusals name numbers that a person understands.
PICTURE_FAULTS = {
    "damaged": "it is damaged",
    "too large": "it is too large",
    "too long to decode": "it takes too long to open",
    "too narrow": "it is too narrow",
}


def error_words(error: AvatarError) -> str:
    """Return what ended a session, or kept one from starting."""
    match error:
        case InvalidField(violations=((("picture", description)), *_)):
            return picture_words(description)
        case MessageTooLarge():
            return "This picture is too large. Choose a smaller one."
        case NoCapacity() | QuotaExceeded() | Draining():
            return places_words("All places are taken", error.retry_s)
        case SessionNotFound() | SessionClosed() | SilentClient() | SlowReader():
            return ENDED
        case ConnectionLost():
            return places_words("The avatar cannot be reached", error.retry_s)
    return places_words("The avatar has failed", error.retry_s)


def picture_words(description: str) -> str:
    """Return what is wrong with a picture. description: the gateway's, such as `too small: 8x8, expected ...; ...`."""
    fault = description.partition(";")[0]
    if re.match(r"not a |too small: \d|too large: (\d|at most)", fault):
        words = f"it is {fault}"
    else:
        words = next((words for part, words in PICTURE_FAULTS.items() if part in description), "")
    return f"This picture cannot be used{words and ': '}{words}. Choose another one."


def form_words(error: AvatarError) -> str:
    """Return why a picture cannot be checked, or a session not be created, before it needs a place."""
    if isinstance(error, NoCapacity):
        return places_words("The picture cannot be read, because the server is busy", error.retry_s)
    return error_words(error)


def places_words(fault: str, retry_s: float | None = None) -> str:
    """Return a fault that passes, and when to try again."""
    return f"{fault}. Try again in {max(RETRY_S, math.ceil(retry_s or 0)):g} seconds."


def notice_words(notice: Notice) -> str:
    """Return a stream's notice; the gateway's own words for one of an unknown kind."""
    if notice.kind is NoticeKind.TEXT_UNSPOKEN:
        if notice.reason == InvalidText.reason:
            return "This text cannot be spoken: it is too long. Send it in parts."
        return "The voice did not speak all of the text. Send the rest again."
    return NOTICES.get(notice.kind) or f"{notice.message[:1].upper()}{notice.message[1:].rstrip('.')}."


def lag_words(sustained_rate: float) -> str:
    """Return what a visitor has to know of a deployment that is slower than real time; empty if it keeps up.

    sustained_rate: of the capabilities; 0 if it is not known.
    """
    if not 0 < sustained_rate < 1:
        return ""
    seconds = math.ceil(100 / sustained_rate) / 10  # never the same ten
    return f"This machine computes 10 seconds of video in {seconds:g} seconds; the picture will lag."
