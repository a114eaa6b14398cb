"""Reading of pictures: each is decoded by a process of its own, which is killed when it passes its limits.

    bytes --decoder process--> (h, w, 3) uint8

What kills a decoder, or keeps it busy, harms nothing but itself; this module says in words what became of it.

Axes: h w height and width, in pixels. Sizes are (width, height).
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange, reduce
from torch import Tensor

from avatar.vae.picture.rule import Fit, PictureRule, Size

# A picture has TIME_S. On a machine so busy that the decoder hardly ran it has longer, up to LONGEST_S.
TIME_S = 1.9
LONGEST_S = 20.0
POLL_EVERY_S = 0.1
TICKS = os.sysconf("SC_CLK_TCK")

PROGRAM = (sys.executable, "-P", "-m", "avatar.vae.picture.decoder")
# Nothing of this process's environment: its settings have passwords.
ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).parents[3]),
    "PYTHONDONTWRITEBYTECODE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
SLOW = "takes too long to decode; send a smaller one, or save it in another format"
BUSY = "the machine is too busy to decode a picture; try again later"
TOO_LARGE = "too large: it needs too much memory to decode; send a smaller one, or save it in another format"


@dataclass(frozen=True)
class Picture:
    """A picture at the video's size.

    rgb: (h, w, 3) uint8. size: of the whole picture as it is shown, before it was fitted. num_faces: upright faces in
    the picture. face_share: part of its area that the largest takes, in [0, 1]; 0 without a face. notice: what is wrong
    with the picture and what to do about it, in words; empty if nothing is.
    """

    rgb: Tensor
    size: Size
    num_faces: int
    face_share: float
    notice: str


def read_picture(data: bytes, rule: PictureRule, size: Size | int | None = None, fit: Fit | None = None) -> Picture:
    """Decode a picture and fit it to the video's size, within 2 s and 1 GiB.

    data: a PNG, JPEG, WebP, HEIC or AVIF file, both sides 16 to 16384 pixels, at most 50 megapixels; an animation gives
    its first frame, a JPEG has at most 100 scans. A PNG or JPEG whose end is missing is taken, with a notice, if nine
    tenths of its rows can be read.
    size, fit: the session's size or area, and its fit; None for the rule's choice.
    Fit "cover" shows the picture as viewers do (EXIF orientation and ICC profile applied, transparent parts over
    white), cropped to the video's shape at its centre. Fit "face" is the same, cropped around the largest face
    (`avatar.vae.face.crop.face_crop`), and equals "cover" without one. Fit "reference" equals the reference
    implementation, which ignores orientation, profile and transparency and pads with black; it exists for equal
    numbers.
    ValueError if the file is no such picture or damaged, passes a limit, or the size or fit is not available.
    TimeoutError if the machine was too busy to decode it.
    """
    request = json.dumps({"rule": asdict(rule), "size": size, "fit": fit}).encode()
    output = run_decoder(request + b"\n" + data)
    line, _, pixels = output.partition(b"\n")
    response = json.loads(line)
    if refusal := response.get("refusal"):
        raise ValueError(refusal)
    rgb = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(*response["shape"])
    facts = response["num_faces"], response["face_share"], response["notice"]
    return Picture(rgb, tuple(response["size"]), *facts)


def read_mask(data: bytes, portrait: bytes, size: Size, fit: Fit, cell: int) -> Tensor:
    """Read an actor's mask: (rows, columns) float32 in [0, 1], the mask's mean brightness in each cell of the video.

    data: a file as in `read_picture`, white where the portrait shows the actor. portrait: the file of the portrait.
    size, fit: the video's size, and the portrait's fit. cell: side of a cell in pixels; it divides the video's sides.
    ValueError if the mask is no picture, or of another size than the portrait.
    """
    rule = PictureRule(fit, width=size[0], height=size[1])
    mask, shown = read_picture(data, rule), read_picture(portrait, rule)
    if mask.size != shown.size:
        raise ValueError(f"a mask must have the portrait's size {shown.size}, got {mask.size}")
    brightness = mask.rgb.float().mean(-1) / 255
    return reduce(brightness, "(rows cell) (columns cell2) -> rows columns", "mean", cell=cell, cell2=cell)


def to_pixels(rgb: Tensor) -> Tensor:
    """Convert uint8 (h, w, 3) to float32 (3, h, w) in [-1, 1]."""
    return rearrange(rgb, "h w c -> c h w") / 255 * 2 - 1


def run_decoder(message: bytes) -> bytes:
    """Return the response of a decoder process to a message.

    ValueError if the picture in it ends the process; TimeoutError if the machine is too busy.
    """
    started_s = time.monotonic()
    with subprocess.Popen(
        PROGRAM,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env=ENVIRONMENT,
    ) as process:
        unsent: bytes | None = message
        wait_s = TIME_S
        while True:
            try:
                output, errors = process.communicate(unsent, timeout=wait_s)
                break
            except subprocess.TimeoutExpired:
                unsent, wait_s = None, POLL_EVERY_S
                is_slow = processor_s(process.pid) > 0.95 * TIME_S
                if is_slow or time.monotonic() - started_s > LONGEST_S:
                    process.kill()
                    process.communicate()
                    raise (ValueError(SLOW) if is_slow else TimeoutError(BUSY)) from None
            except BaseException:
                process.kill()
                raise
    if process.returncode == 0:
        return output
    if process.returncode > 0:  # a defect of ours: whatever the picture does is answered, or ends with a signal
        raise RuntimeError(f"the decoder of pictures failed: {errors.decode(errors='replace')[-1000:]}")
    name = signal.Signals(-process.returncode).name
    if name == "SIGXCPU":
        raise ValueError(SLOW)
    if name == "SIGKILL":  # by the kernel, whose memory was used up
        raise ValueError(TOO_LARGE)
    raise ValueError(f"damaged in a way that ends its decoder ({name})")


def processor_s(pid: int) -> float:
    """Return the processor time that a running child has used, in seconds; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0  # the limit of the process itself remains
    return (int(fields[11]) + int(fields[12])) / TICKS
