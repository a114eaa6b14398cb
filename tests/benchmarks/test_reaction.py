"""Tests of benchmarks.pipeline.reaction: rows beside the promise."""

import pytest

from avatar.v1.avatar_service_pb2 import GetCapabilitiesResponse
from benchmarks.pipeline.reaction import MARGIN_S, reaction_rows
from benchmarks.voice import ENDPOINT, voice_rows


def test_a_reaction_is_compared_with_the_promise_or_a_target() -> None:
    promised = GetCapabilitiesResponse(reaction_s=0.5, reaction_ahead_s=0.2, sustained_rate=2.0)
    rows = reaction_rows("n", promised, [0.4] * 20, [0.3] * 20)
    assert [each.figure for each in rows] == [
        *("reaction, microphone, n: p50", "reaction, microphone, n: p95"),
        *("reaction, sent at once, n: p50", "reaction, sent at once, n: p95"),
    ]
    assert [each.target for each in rows] == pytest.approx([0.5 + MARGIN_S] * 2 + [0.2 + MARGIN_S] * 2)
    assert [each.met for each in rows] == [True, True, False, False]
    given = reaction_rows("n", promised, [0.4] * 20, [0.3] * 20, (0.35, 0.35))
    assert [each.met for each in given] == [False, False, True, True]


def test_a_deployment_that_promises_nothing_has_no_target() -> None:
    rows = reaction_rows("n", GetCapabilitiesResponse(sustained_rate=0.74), [2.0], [1.0])
    assert {(each.target, each.bound) for each in rows} == {(None, None)}
    assert "0.74" in rows[0].note


def test_text_has_a_target_where_the_engine_takes_no_time() -> None:
    rows = voice_rows(ENDPOINT, 0.1, [0.01] * 20, [0.2] * 20)
    assert [each.met for each in rows] == [True, True, False, False]
    assert [each.bound for each in rows] == [None, None, 0.1, 0.1]
    assert {each.met for each in voice_rows("flite", 0.1, [0.01], [0.2])} == {None}
