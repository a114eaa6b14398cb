"""A real Prometheus and a real OTLP receiver beside a running suite, one of whose workers is killed: `make alerts`."""

import asyncio
import re
from collections.abc import AsyncGenerator
from math import isfinite
from pathlib import Path

import pytest
import pytest_asyncio

from deploy import deletion_cost
from tests.conftest import speech
from tests.deploy.observed import RATE_S, ObservedSuite, observed_suite, until
from tests.deploy.test_kubernetes import objects
from tests.deploy.test_monitoring import expressions
from tests.product import answer, connected, finish, frame, new_reference, new_session, opening, pieces, send, speak
from tests.refusals import refused

pytestmark = [pytest.mark.alerts, pytest.mark.asyncio(loop_scope="module")]

STREAM_S = 240.0
STAGES = [("audio", None), ("denoiser", "0"), ("denoiser", "1"), ("encode", None), ("vae", None)]
# Expressions without data, with the reason.
NO_VOICE = "the suite has no voice worker"
WITHOUT_VALUE = {
    "blocks: Time to a sentence's first sound": NO_VOICE,
    "faults: Text that was not spoken": NO_VOICE,
    "AvatarTextUnspoken": NO_VOICE,
    "faults: Rebuilding, 95th percentile": "a rate needs two values of a series, which begins with its only rebuild",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def observed(two_levels: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[ObservedSuite, None]:
    async with observed_suite(two_levels, tmp_path_factory.mktemp("observed")) as observed:
        yield observed


async def test_a_killed_worker_raises_an_alert_until_it_is_back(observed: ObservedSuite, picture: bytes) -> None:
    async def is_raised() -> bool:
        return bool(await observed.firing("AvatarWorkerGone"))

    async def is_over() -> bool:
        return not await is_raised()

    vae, audio = observed.suite.processes["vae"], list(pieces(speech(2.0)))
    await observed.scraped()
    await until(is_over)  # a worker that answered late raised it at the start
    async with connected(observed.suite.gateway) as stub:
        session = await new_session(stub, picture)
        call = stub.StreamAvatar(timeout=STREAM_S)
        await call.write(opening(session.id))
        await answer(call)
        await send(call, audio[:25])
        await frame(call)
        vae.kill()
        await vae.wait()
        await until(is_raised)
        (alert,) = await observed.firing("AvatarWorkerGone")
        assert (alert["target"], alert["severity"]) == (observed.suite.targets["vae"], "page")
        await observed.start("vae")
        await send(call, audio[25:])
        streamed = await finish(call)
    assert streamed.closed.num_blocks == 5
    await until(is_over)


async def test_every_expression_of_dashboards_and_rules_returns_data(observed: ObservedSuite, picture: bytes) -> None:
    for prompt in ("a person who reads", "a person who smiles"):
        async with connected(observed.suite.gateway) as stub:
            await speak(stub, (await new_session(stub, picture, prompt=prompt)).id, speech(1.0))
            async with refused("INVALID_FIELD"):  # a call that fails at a worker and at the gateway
                await new_reference(stub, b"no picture")
        await observed.scraped()
    found = [(where, await observed.ask(measured(expression))) for where, expression in expressions()]
    without = {where for where, each in found if not any(isfinite(float(one["value"][1])) for one in each)}
    assert without == WITHOUT_VALUE.keys()


async def test_autoscaling_sees_every_stage(observed: ObservedSuite) -> None:
    for name, each in objects("autoscaling", "ScaledObject").items():
        if name in observed.metrics:
            (found,) = await observed.ask(each["spec"]["triggers"][0]["metadata"]["query"])
            assert float(found["value"][1]) == 0, "no session of its capacity"
    assert await asyncio.to_thread(deletion_cost.streams, observed.prometheus) == {"127.0.0.1": 0}


def measured(expression: str) -> str:
    """Return an expression without what a healthy suite does not fulfil: comparisons, and absence."""
    expression = expression.replace("$__rate_interval", f"{RATE_S}s").replace("absent(", "(")
    return re.sub(r"[=<>]+(?= on )", "+", re.sub(r"(==|>|<) *[\d.]+", "", expression))


async def test_the_receiver_gets_each_block_as_one_trace_of_all_stages(observed: ObservedSuite, picture: bytes) -> None:
    before = set(observed.block_traces())
    async with connected(observed.suite.gateway) as stub:
        num_blocks = (await speak(stub, (await new_session(stub, picture)).id, speech(1.0))).closed.num_blocks

    def new() -> list[list[dict[str, str]]]:
        return [spans for trace, spans in observed.block_traces().items() if trace not in before]

    async def is_complete() -> bool:
        return sum(len(spans) for spans in new()) >= num_blocks * len(STAGES)

    await until(is_complete)
    assert [stages(spans) for spans in new()] == [STAGES] * num_blocks
    for spans in new():
        (root,) = (span for span in spans if not span["Parent ID"])
        assert root["Name"] == "avatar.audio"
        assert {span["Parent ID"] for span in spans if span is not root} == {root["ID"]}


def stages(spans: list[dict[str, str]]) -> list[tuple[str, str | None]]:
    """Return the stage and the level of each span, sorted."""
    return sorted(((span["avatar.stage"], span.get("avatar.level")) for span in spans), key=str)
