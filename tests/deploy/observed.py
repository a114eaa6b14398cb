"""A suite of processes that is observed by programs that are not ours: Debian's Prometheus, and rotel for traces.

`make alerts` unpacks Prometheus into .venv/bin and installs rotel. Prometheus reads the deployment's own configuration
and rules, except that its targets are listed instead of resolved, and that intervals are seconds.
"""

import asyncio
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from services.local.processes import Suite, free_ports, start_redis, until_healthy
from tests.deploy.test_monitoring import DEPLOY, RULES

NAMES = ("audio", "denoiser-0", "denoiser-1", "vae", "text", "gateway")
# A lost worker is missing for as long as another takes to start, on a busy machine.
GATEWAY = {"AVATAR_REBUILD_S": "120"}
EXPORTING = {"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_BSP_SCHEDULE_DELAY": "100"}
SCRAPE_S, RATE_S, SHORT_FOR = 1, 60, "2s"
POLL_S, ANSWER_S, WAIT_S = 0.2, 10.0, 120.0


@dataclass(frozen=True)
class ObservedSuite:
    """A running suite of two levels, with Prometheus and rotel.

    checkpoint: folder. metrics: HOST:PORT of each process's `/metrics`, by name. prometheus, otlp: URLs.
    """

    suite: Suite
    checkpoint: Path
    metrics: dict[str, str]
    prometheus: str
    otlp: str

    async def start(self, name: str) -> None:
        """Start a process of the suite, or start it again."""
        service, _, level = name.partition("-")
        settings = {
            "AVATAR_LISTEN": self.suite.targets[name],
            "AVATAR_REDIS_URL": self.suite.redis_url,
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.otlp,
            "OTEL_EXPORTER_PROMETHEUS_PORT": self.metrics[name].rpartition(":")[2],
            **EXPORTING,
        }
        if name == "gateway":
            targets = self.suite.targets
            settings |= {"AVATAR_AUDIO": targets["audio"], "AVATAR_VAE": targets["vae"], "AVATAR_TEXT": targets["text"]}
            settings |= {"AVATAR_DENOISERS": f"{targets['denoiser-0']},{targets['denoiser-1']}", **GATEWAY}
        else:
            settings |= {"AVATAR_CHECKPOINT": str(self.checkpoint.absolute()), "AVATAR_LEVELS": level or "0"}
        await self.suite.start(name, sys.executable, "-m", f"services.{service}", **settings)

    async def ask(self, expression: str) -> list[dict[str, Any]]:
        """Return the series that a PromQL expression gives now: `metric`, its labels, and `value`, time and value."""
        query = urlencode({"query": expression})
        answer = await asyncio.to_thread(_get, f"{self.prometheus}/api/v1/query?{query}")
        found: list[dict[str, Any]] = json.loads(answer)["data"]["result"]
        return found

    async def firing(self, alert: str) -> list[dict[str, str]]:
        """Return the labels of each instance of an alert that fires."""
        found = await self.ask(f'ALERTS{{alertname="{alert}", alertstate="firing"}}')
        return [each["metric"] for each in found]

    async def scraped(self) -> None:
        """Wait until Prometheus has read all processes after this call, twice."""
        since_s = time.time() + 2 * SCRAPE_S

        async def is_scraped() -> bool:
            found = await self.ask('timestamp(up{job="avatar"} == 1)')
            return len(found) == len(NAMES) and min(float(each["value"][1]) for each in found) > since_s

        await until(is_scraped)

    def block_traces(self) -> dict[str, list[dict[str, str]]]:
        """Return the spans of each block that rotel has received, by trace."""
        return block_traces(self.suite.log_of("rotel"))


def _get(url: str) -> bytes:
    with urlopen(url, timeout=ANSWER_S) as answer:
        body: bytes = answer.read()
    return body


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until a condition holds. TimeoutError after WAIT_S seconds."""
    async with asyncio.timeout(WAIT_S):
        while True:
            if await condition():
                return
            await asyncio.sleep(POLL_S)


def block_traces(log: Path) -> dict[str, list[dict[str, str]]]:
    """Return the spans of each block in rotel's output, by trace.

    A span's fields: `Trace ID`, `Parent ID`, `ID`, `Name`, and its attributes, such as `avatar.stage`.
    """
    traces = defaultdict(list)
    for span in re.split(r"^Span #\d+$", log.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        own = span.partition("\nLinks:")[0].partition("\nResourceSpans")[0]
        fields = dict(re.findall(r"^ +(Trace ID|Parent ID|ID|Name) *: (.*)$", own, re.MULTILINE))
        fields |= dict(re.findall(r"^ +-> (avatar[\w.]+): \w+\((.*)\)$", own, re.MULTILINE))
        if "avatar.block.index" in fields:
            traces[fields["Trace ID"]].append(fields)
    return dict(traces)


async def start_rotel(suite: Suite, port: int, http_port: int) -> None:
    """Start an OTLP receiver that writes the spans that it receives to its output."""
    spec = find_spec("rotel")
    assert spec is not None, "rotel is not installed: make alerts"
    assert spec.origin is not None
    flags = {"otlp-grpc-endpoint": f"127.0.0.1:{port}", "otlp-http-endpoint": f"127.0.0.1:{http_port}"}
    flags |= {"exporter": "blackhole", "debug-log": "traces", "debug-log-verbosity": "detailed"}
    options = [part for name, value in flags.items() for part in (f"--{name}", value)]
    await suite.start("rotel", str(Path(spec.origin).with_name("rotel-agent")), "start", *options)


async def _start_prometheus(suite: Suite, port: int, metrics: dict[str, str]) -> None:
    """Start Prometheus with the deployment's configuration; the alert AvatarWorkerGone takes SHORT_FOR to fire."""
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
    (scrape,) = config["scrape_configs"]
    del scrape["dns_sd_configs"]
    # The name that DNS would have found becomes the label `worker`.
    scrape["static_configs"] = [
        {"targets": [target], "labels": {"__meta_dns_name": name}} for name, target in metrics.items()
    ]
    config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    rules = [rule | {"for": SHORT_FOR} if rule["alert"] == "AvatarWorkerGone" else rule for rule in RULES]
    files = {"prometheus.yml": config, "alerts.yml": {"groups": [{"name": "avatar", "rules": rules}]}}
    for name, content in files.items():
        (suite.folder / name).write_text(yaml.safe_dump(content), encoding="utf-8")
    options = {"config.file": suite.folder / "prometheus.yml", "storage.tsdb.path": suite.folder / "data"}
    flags = [f"--{name}={value}" for name, value in options.items()]
    program = Path(sys.executable).with_name("prometheus")
    assert program.exists(), "Prometheus is not unpacked: make alerts"
    await suite.start("prometheus", str(program), *flags, f"--web.listen-address=127.0.0.1:{port}")


@asynccontextmanager
async def observed_suite(checkpoint: Path, folder: Path) -> AsyncGenerator[ObservedSuite, None]:
    """Run such a suite while the body runs. checkpoint: of two levels, with text. folder: of output and settings."""
    redis_port, prometheus_port, otlp_port, http_port, *ports = free_ports(4 + 2 * len(NAMES))
    addresses = [f"127.0.0.1:{port}" for port in ports]
    targets = dict(zip(NAMES, addresses[: len(NAMES)], strict=True))
    metrics = dict(zip(NAMES, addresses[len(NAMES) :], strict=True))
    async with Suite(folder, f"redis://127.0.0.1:{redis_port}", targets) as suite:
        prometheus, otlp = f"http://127.0.0.1:{prometheus_port}", f"http://127.0.0.1:{otlp_port}"
        observed = ObservedSuite(suite, checkpoint, metrics, prometheus, otlp)
        await start_rotel(suite, otlp_port, http_port)
        await _start_prometheus(suite, prometheus_port, metrics)
        await start_redis(suite, redis_port)
        for name in NAMES:
            await observed.start(name)
        await until_healthy(suite)
        await until(lambda: _is_ready(prometheus))
        yield observed


async def _is_ready(prometheus: str) -> bool:
    try:
        await asyncio.to_thread(_get, f"{prometheus}/-/ready")
    except URLError:
        return False
    return True
