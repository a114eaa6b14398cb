"""The wheel in an empty environment: a client, without a tensor library, that talks to a running suite."""

import asyncio
import os
import re
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
# The client's dependencies, each in the oldest version that it accepts.
OLDEST = [
    need.partition(",")[0].replace(">=", "==")
    for need in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
]
CLIENT = """
import asyncio
import sys
import avatar
from avatar.client import connect

async def main(gateway, picture):
    async with connect(gateway) as suite:
        session = await suite.create(picture)
        async with session.stream(audio=bytes(46080)) as stream:
            num_frames = len([frame async for frame in stream.frames()])
    print(num_frames, avatar.__file__)

asyncio.run(main(*sys.argv[1:]))
"""


async def run(*program: object, cwd: Path) -> str:
    """Run a program and return its output. Fails with the program's log unless it exits with 0."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = await asyncio.create_subprocess_exec(
        *map(str, program),
        cwd=cwd,
        env={**without, "PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, log = await process.communicate()
    assert process.returncode == 0, log.decode()
    return out.decode()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_the_wheel_alone_is_a_client_of_a_running_suite(gateway: str, picture: bytes, tmp_path: Path) -> None:
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "dist")
    await run(sys.executable, *build, ROOT, cwd=ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert re.fullmatch(r"avatar_suite-\d+\.\d+\.\d+-py3-none-any\.whl", wheel.name)
    names = ZipFile(wheel).namelist()
    assert {"avatar/v1/avatar_service_pb2.py", "avatar/v1/avatar_service_pb2.pyi", "avatar/store/sessions.py"} <= set(
        names
    )
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"avatar", "avatar_suite"}

    await run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    (tmp_path / "face.png").write_bytes(picture)

    async def installed_with(*needs: str) -> set[str]:
        """Install the wheel, run the client and return the packages as NAME==VERSION."""
        await run(python, "-m", "pip", "install", "--quiet", wheel, *needs, cwd=tmp_path)
        num_frames, file = (await run(python, "-c", CLIENT, gateway, "face.png", cwd=tmp_path)).split()
        assert num_frames == "33", "of three blocks, the first has nine"
        assert Path(file).is_relative_to(tmp_path)
        return set((await run(python, "-m", "pip", "list", "--format", "freeze", cwd=tmp_path)).splitlines())

    assert {need for need in OLDEST if "==" in need} <= await installed_with(*OLDEST)
    installed = await installed_with("--upgrade", "grpcio", "protobuf")
    assert any(line.startswith("protobuf==7.") for line in installed)
    found = {line.partition("==")[0].lower().replace("_", "-") for line in installed}
    pure = {"googleapis-common-protos", "typing-extensions"}
    assert found - {"pip", "setuptools"} == {"avatar-suite", "grpcio", "protobuf", *pure}
