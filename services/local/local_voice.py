"""The voice of a suite on one machine: an operator's command, or Piper in a process of its own."""

import asyncio
import sys
from contextlib import suppress
from pathlib import Path

from services.local.processes import HEALTHY_S, POLL_S, Suite, free_ports

# The interpreter of the environment into which `make` installs Piper.
PIPER = Path(sys.prefix) / "piper/bin/python"


def voice_settings(command: str = "") -> dict[str, str]:
    """Return the settings of a voice worker: over a command, or else over Piper at a free port, if it is installed.

    Empty without any voice.
    """
    if command:
        return {"AVATAR_VOICE_COMMAND": command}
    if not PIPER.exists():
        return {}
    return {"AVATAR_VOICE_URL": f"http://127.0.0.1:{free_ports(1)[0]}/v1", "AVATAR_VOICE_LANGUAGES": "en"}


async def start_piper(suite: Suite, settings: dict[str, str]) -> None:
    """Start Piper where the settings name its endpoint, and wait until it serves. RuntimeError if it does not."""
    if "AVATAR_VOICE_URL" not in settings:
        return
    port = settings["AVATAR_VOICE_URL"].rpartition(":")[2].removesuffix("/v1")
    await suite.start("piper", str(PIPER), "-m", "services.local.piper_server", port)
    with suppress(TimeoutError):
        async with asyncio.timeout(HEALTHY_S):
            while suite.processes["piper"].returncode is None:
                if b"serving" in suite.log_of("piper").read_bytes():
                    return
                await asyncio.sleep(POLL_S)
    raise RuntimeError(f"piper does not serve; see {suite.log_of('piper')}")
