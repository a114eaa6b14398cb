"""Render a WAV file and a portrait to an MP4 file, as fast as the suite can.

python examples/wav_to_mp4.py assets/speech.wav assets/portrait.png out.mp4

Needs av and numpy in addition to the client, to write the file.
"""

import argparse
import asyncio
import os
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from avatar.client import AvatarError, channel_credentials, connect, read_wav
from avatar.errors import ConnectionLost

HINT = "is a gateway running there? `python -m services` starts one on this machine"
# Every player supports AAC at this rate; the encoder does not support every rate that speech may have.
AAC_RATE_HZ = 48000
# Raw frames carry no mark which says that a machine made them, so the film gets one: docs/operations/ai_act.md.
MARK = "made by a machine: http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def film_path(text: str) -> Path:
    """Return the path of a film to write, whose folder is made. ValueError unless its name is a film's."""
    path = Path(text)
    if path.suffix.lower() not in (".mp4", ".m4v", ".mov") or path.is_dir():
        raise ValueError(f"{text} is not the name of a film to write, expected one that ends in .mp4, .m4v or .mov")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("speech", help="WAV file")
    parser.add_argument("portrait", help="PNG, JPEG, WebP, HEIC or AVIF file")
    parser.add_argument("out", help="film to write: .mp4, .m4v or .mov; its folder is made")
    parser.add_argument("--target", default="127.0.0.1:7000", help="HOST:PORT of the gateway")
    parser.add_argument("--tls", nargs="?", const="", metavar="CA", help="use TLS; PEM file of a private authority")
    parser.add_argument("--token", default=os.environ.get("AVATAR_TOKEN", ""), help="bearer token; or AVATAR_TOKEN")
    parser.add_argument("--seed", type=int, help="the same seed gives the same frames")
    flags = parser.parse_args()

    speech, rate_hz = read_wav(flags.speech)
    path = film_path(flags.out)

    credentials = None if flags.tls is None else channel_credentials(flags.tls)
    async with connect(flags.target, credentials=credentials, token=flags.token) as avatar:
        session = await avatar.create(flags.portrait, seed=flags.seed)
        if session.notice:
            print(f"notice: {session.notice}")
        width, height, frame_rate_hz = session.video.width, session.video.height, session.video.frame_rate_hz
        with av.open(f"file:{path}", "w") as out:  # the name alone is a protocol's up to a colon
            video = out.add_stream("libx264", rate=frame_rate_hz, options={"crf": "18"})
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            audio = out.add_stream("aac", rate=AAC_RATE_HZ, layout="mono")
            out.metadata["comment"] = MARK
            async with session.stream(audio=speech, rate_hz=rate_hz) as stream:
                async for frame in stream.frames():
                    pixels = np.frombuffer(frame.data, np.uint8).reshape(height, width, 3)
                    image = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    image.pts, image.time_base = frame.index, Fraction(1, frame_rate_hz)
                    out.mux(video.encode(image))
            out.mux(video.encode(None))
            samples = av.AudioFrame(format="s16", layout="mono", samples=len(speech) // 2)
            samples.planes[0].update(speech)
            samples.rate, samples.pts, samples.time_base = rate_hz, 0, Fraction(1, rate_hz)
            out.mux(audio.encode(samples))
            out.mux(audio.encode(None))
    assert stream.closed
    print(f"wrote {path}: {stream.closed.num_frames} frames of {width} x {height}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except ConnectionLost as error:
        sys.exit(f"error: {error}; {HINT}")
    except (AvatarError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
