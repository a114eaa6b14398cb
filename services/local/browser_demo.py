"""The suite as processes, and the page for a browser in front of it.

    python -m services.local.browser_demo [--listen 127.0.0.1:8080] [--tts "flite -t {text} -o {wav}"] [--label]

AVATAR_REDIS_URL names a Redis server to use; without it, one is started and ends with this program.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path

from services.local.launch import launched
from services.local.local_voice import start_piper, voice_settings
from services.local.processes import ROOT


async def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m services.local.browser_demo", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--listen", default="127.0.0.1:8080", help="HOST:PORT to serve the page at")
    parser.add_argument("--tts", default="", metavar="COMMAND", help="speaks {text} into {wav} (default: Piper)")
    parser.add_argument("--label", action="store_true", help='draw "AI" into every frame')
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "models/tiny", help="folder of the models")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder of the processes' output")
    flags = parser.parse_args()
    print(f"starting Redis, the services and the page; their output is in {flags.out / 'logs'}")
    voice, redis_url = voice_settings(flags.tts), os.environ.get("AVATAR_REDIS_URL")
    async with launched(flags.checkpoint, flags.out / "logs", redis_url=redis_url, voice=voice) as suite:
        await start_piper(suite, voice)
        page = ("-m", "web", "--target", suite.gateway, "--listen", flags.listen)
        await suite.start("web", sys.executable, *page, *(["--label"] if flags.label else []))
        print(f"the page is at http://{flags.listen}; ctrl-C ends it", flush=True)
        ended = await suite.first_to_end()
        raise RuntimeError(f"{ended} ended; see {suite.log_of(ended)}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
