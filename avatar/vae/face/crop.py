"""The part of a picture that a video shows: around its face, or its centre.

    faces, sizes of picture and video --frame_face | frame_centre--> crop, notice

Boxes are left, top, right, bottom in pixels of the picture. Sizes are (width, height).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from avatar.vae.picture.rule import Size

Box = tuple[float, float, float, float]

# Side of the face and distance of its centre from the top, over the shorter side of the crop: amid people
# like those that models/tiny is trained on, whose sides are 0.47 to 0.64.
FACE_SIDE, FACE_CENTRE = 0.56, 0.55
# The centre crop is kept if the face in it has nearly this side and place: no more than this larger, smaller or away.
SIDE_TOLERANCE, CENTRE_TOLERANCE = 0.07, 0.05
# Enlargement of the picture in the video from which its face counts as too small.
MAX_ENLARGEMENT = 1.5
# Part of a face's square that is visible if the face counts as shown.
MIN_VISIBLE = 0.75


@dataclass(frozen=True)
class Face:
    """A face in a picture: a square from the brows' upper side to the chin.

    x, y: its centre, and side: its width and height, in pixels of the picture. score: in [0, 1].
    """

    x: float
    y: float
    side: float
    score: float

    @property
    def box(self) -> Box:
        """Left, top, right and bottom, in pixels; it may reach beyond the picture."""
        half = self.side / 2
        return self.x - half, self.y - half, self.x + half, self.y + half

    def contains(self, other: "Face") -> bool:
        """Return True if the other face's centre is inside this one's square."""
        return max(abs(other.x - self.x), abs(other.y - self.y)) < self.side / 2


@dataclass(frozen=True)
class Framing:
    """The crop of a picture, and what is known of the faces in it.

    crop: around a face; it may reach beyond the picture. None: the fit's own, at the centre. num_faces: in the picture.
    face_share: part of the picture that the largest face takes, in [0, 1]; 0 without a face. notice: what is wrong with
    the picture and what to do, in words; empty if nothing is.
    """

    crop: Box | None
    num_faces: int
    face_share: float
    notice: str


def frame_face(faces: Sequence[Face], picture: Size, video: Size) -> Framing:
    """Frame the largest face of a picture, or its centre if it has none. faces: largest first."""
    if not faces:
        notice = (
            "No face was found in this picture, so the video shows its centre. Send a picture of one person who is "
            "upright and looks at the camera."
        )
        return Framing(None, 0, 0.0, notice)
    face, notices = faces[0], []
    crop = face_crop(face, picture, video)
    shown = centre_crop(picture, video) if crop is None else crop
    if len(faces) > 1:
        notices.append(
            f"{len(faces)} faces were found in this picture, and the largest one was taken. To show another person, "
            "send a picture of that person alone."
        )
    enlargement = min(video) / shorter_side(shown)
    if enlargement > MAX_ENLARGEMENT:
        needed = math.ceil(face.side * enlargement / MAX_ENLARGEMENT)
        notices.append(
            f"The face is too small: it is {face.side:.0f} pixels wide and is enlarged {enlargement:.1f} times, so the "
            f"video is blurred. Send a picture in which it is at least {needed} pixels wide."
        )
    return Framing(crop, len(faces), face_share(faces, picture), " ".join(notices))


def frame_centre(faces: Sequence[Face], picture: Size, shown: Box) -> Framing:
    """Describe a picture whose crop does not follow faces. faces: largest first. shown: what the video shows of it."""
    notice = ""
    if not faces:
        notice = (
            "No face was found in this picture. Send a picture of one person who is upright and looks at the camera."
        )
    elif not any(visible_share(face, shown) >= MIN_VISIBLE for face in faces):
        notice = (
            "No face is in the part of the picture that the video shows. Request the fit `face`, or send a picture "
            "with the face in the middle."
        )
    return Framing(None, len(faces), face_share(faces, picture), notice)


def face_crop(face: Face, picture: Size, video: Size) -> Box | None:
    """Return the crop around a face, in the shape of the video; None to keep the centre crop.

    In units of the crop's shorter side, the face has the side FACE_SIDE; its centre is FACE_CENTRE from the top and in
    the middle. A crop that would reach beyond the picture is moved into it; if it is too large, it is made smaller,
    as long as it holds the whole face. Only where the picture is too narrow for that it reaches beyond the picture.
    The centre crop is kept if it shows the face nearly so.
    """
    if is_framed(face, centre_crop(picture, video)):
        return None
    shape = [length / min(video) for length in video]
    left, top, right, bottom = clipped(face.box, picture)
    least = max((right - left) / shape[0], (bottom - top) / shape[1])
    largest = min(length / ratio for length, ratio in zip(picture, shape, strict=True))
    unit = max(min(face.side / FACE_SIDE, largest), least)
    left, right = moved_inside(face.x - unit * shape[0] / 2, unit * shape[0], picture[0])
    top, bottom = moved_inside(face.y - unit * FACE_CENTRE, unit * shape[1], picture[1])
    return left, top, right, bottom


def is_framed(face: Face, crop: Box) -> bool:
    """Return True if a crop shows the face nearly as `face_crop` makes it."""
    unit = shorter_side(crop)
    sideways = face.x - (crop[0] + crop[2]) / 2
    down = face.y - (crop[1] + unit * FACE_CENTRE)
    return (
        abs(face.side - unit * FACE_SIDE) <= unit * SIDE_TOLERANCE
        and max(abs(sideways), abs(down)) <= unit * CENTRE_TOLERANCE
    )


def centre_crop(picture: Size, video: Size) -> Box:
    """Return the largest crop in the shape of the video, at the picture's centre."""
    scale = min(length / wanted for length, wanted in zip(picture, video, strict=True))
    left, top = ((length - wanted * scale) / 2 for length, wanted in zip(picture, video, strict=True))
    return left, top, picture[0] - left, picture[1] - top


def reference_crop(picture: Size, video: Size) -> Box:
    """Return what the fit "reference" shows of a picture: its centre, and what is beside it."""
    scale = min(picture) / min(video)
    left, top = ((length - wanted * scale) / 2 for length, wanted in zip(picture, video, strict=True))
    return left, top, picture[0] - left, picture[1] - top


def moved_inside(start: float, length: float, limit: float) -> tuple[float, float]:
    """Return a span's start and end, moved into [0, limit]; a span that is longer is centred there."""
    start = min(max(start, 0.0), limit - length) if length <= limit else (limit - length) / 2
    return start, start + length


def clipped(box: Box, picture: Size) -> Box:
    """Return the part of a box that is inside the picture."""
    width, height = picture
    left, right = (min(max(x, 0.0), width) for x in box[::2])
    top, bottom = (min(max(y, 0.0), height) for y in box[1::2])
    return left, top, right, bottom


def visible_share(face: Face, crop: Box) -> float:
    """Return the part of a face's square that is inside a crop, in [0, 1]."""
    spans = (min(face.box[i + 2], crop[i + 2]) - max(face.box[i], crop[i]) for i in (0, 1))
    return math.prod(max(0.0, span) for span in spans) / face.side**2


def face_share(faces: Sequence[Face], picture: Size) -> float:
    """Return the part of the picture that the first face takes, in [0, 1]; 0 without a face."""
    if not faces:
        return 0.0
    left, top, right, bottom = clipped(faces[0].box, picture)
    return (right - left) * (bottom - top) / math.prod(picture)


def shorter_side(crop: Box) -> float:
    """Return a crop's shorter side, in pixels of the picture."""
    return min(crop[2] - crop[0], crop[3] - crop[1])
