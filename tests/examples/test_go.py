"""The program of examples/go, compiled by Debian's Go and run by `make test-go` against a gateway."""

import asyncio
import os
import re
import shutil
import subprocess
from pathlib import Path

import av
import pytest

from tests.conftest import write_speech
from tests.proxy import proxied

ROOT = Path(__file__).parents[2]
# Debian's gRPC, 1.33, is older than these names; everything else is compiled as it is.
OLDER = {
    "grpc.NewClient(": "grpc.Dial(",
    "grpc.WithTransportCredentials(insecure.NewCredentials())": "grpc.WithInsecure()",
    '\t"google.golang.org/grpc/credentials/insecure"\n': "",
}

pytestmark = pytest.mark.go


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The compiled program, by the commands of docs/integration.md but with packages from Debian."""
    go = shutil.which("go")
    assert go, "`make test-go` puts Go on the PATH"
    usr = Path(go).parents[1]
    workspace = tmp_path_factory.mktemp("go")
    folder = workspace / "src/example.com/talk"
    shutil.copytree(ROOT / "examples/go", folder)
    connect = (folder / "connect.go").read_text()
    for name, older in OLDER.items():
        assert name in connect
        connect = connect.replace(name, older)
    (folder / "connect.go").write_text(connect)
    template = str(folder / "buf.gen.yaml")
    subprocess.run(
        ["buf", "generate", "protos", "--path", "protos/avatar/v1", "--template", template, "--output", str(folder)],
        cwd=ROOT,
        check=True,
    )
    environment = {
        **os.environ,
        "GO111MODULE": "off",
        "GOROOT": str(usr / "lib/go"),
        "GOPATH": f"{workspace}:{usr / 'share/gocode'}",
        "GOCACHE": str(workspace / "cache"),
    }
    for arguments in (["vet", "."], ["build", "-o", "talk", "."]):
        subprocess.run([go, *arguments], cwd=folder, env=environment, check=True)
    return str(folder / "talk")


@pytest.fixture
def inputs(tmp_path: Path, picture: bytes) -> tuple[str, str, str]:
    """A WAV file of three seconds, a portrait, and the name of the video."""
    (tmp_path / "face.png").write_bytes(picture)
    return str(write_speech(tmp_path / "speech.wav", 3)), str(tmp_path / "face.png"), str(tmp_path / "out.h264")


async def run(*arguments: str, status: int = 0) -> str:
    process = await asyncio.create_subprocess_exec(
        *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == status, output.decode()
    return output.decode()


@pytest.mark.parametrize(("flags", "num_resumes"), [((), 0), (("-break-at", "12"), 1)])
async def test_a_wav_becomes_h264(
    program: str, gateway: str, inputs: tuple[str, str, str], flags: tuple[str, ...], num_resumes: int
) -> None:
    """With a broken connection, too."""
    printed = await run(program, "-target", gateway, *flags, *inputs)
    assert f"81 frames of 64 x 64, {num_resumes} resumes" in printed
    with av.open(inputs[2], mode="r", format="h264") as film:
        assert sum(1 for _ in film.decode(video=0)) == 81


async def test_a_connection_that_is_cut_resumes(
    program: str, gateway: str, inputs: tuple[str, str, str], tmp_path: Path
) -> None:
    out = Path(inputs[2])
    speech = str(write_speech(tmp_path / "long.wav", 12))
    async with proxied(gateway) as proxy:
        running = asyncio.create_task(run(program, "-target", proxy.target, speech, *inputs[1:]))
        while not running.done() and not (out.exists() and out.stat().st_size):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        proxy.cut()
        assert "297 frames of 64 x 64, 1 resumes" in await running


async def test_a_live_stream_is_interrupted(program: str, gateway: str, inputs: tuple[str, str, str]) -> None:
    printed = await run(program, "-target", gateway, "-interrupt-after", "1.5", *inputs)
    assert re.search(r"^interrupted at [\d.]+ s, speaking: true$", printed, re.MULTILINE)


async def test_an_error_names_its_reason_and_field(program: str, gateway: str, inputs: tuple[str, str, str]) -> None:
    Path(inputs[1]).write_text("no picture")
    printed = await run(program, "-target", gateway, *inputs, status=1)
    assert re.search(r"^picture: \S.+\nerror: INVALID_FIELD .+$", printed, re.MULTILINE)
