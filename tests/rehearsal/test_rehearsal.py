"""The published checkpoint from start to end, on one device and as a process for each level; and their timeline."""

from pathlib import Path

import pytest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from PIL import Image

from tests.rehearsal.suite import LAYOUTS, NUM_BLOCKS, run
from tests.rehearsal.timeline import Bar, bars, draw, longest_gap_s

SECOND = 10**9
# The longest is that of the killed process, until it has loaded its weights again and is warm.
LONGEST_GAP_S = 180
# By an allocator with a cap, and by the arithmetic of AVATAR_MEMORY_GB.
REFUSALS = {"one-device": "has no memory left", "four-levels": "of memory for streams"}
STAGES = {"audio", *(f"denoiser-{level}" for level in range(4)), "vae", "encode"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_sessions_live_through_prompts_a_lost_worker_and_an_interruption(
    layout: str, published: Path, picture: bytes, tmp_path: Path
) -> None:
    found = run(layout, published, tmp_path, picture)
    first, second = found.streamed
    for streamed in (first, second):
        assert streamed.indexes == list(range(3, 3 + len(streamed.frames))), "no frame is lost, none is repeated"
    assert len(first.frames) >= 12 * NUM_BLOCKS - 3
    assert REFUSALS[layout] in found.refusal
    assert {each.row for each in found.work} == STAGES
    assert set(found.statuses.values()) == {0}, "all drained"
    assert longest_gap_s(found.work, found.work[0].start_ns, found.work[-1].end_ns) < LONGEST_GAP_S
    draw(tmp_path / "timeline.png", found.work, found.events)
    with Image.open(tmp_path / "timeline.png") as timeline:
        assert timeline.width > 1000


def test_a_bar_is_a_blocks_step_and_a_gap_is_a_time_without_any() -> None:
    def span(stage: str, block: int, start_s: int, end_s: int) -> Span:
        values = {"avatar.stage": AnyValue(string_value=stage), "avatar.block.index": AnyValue(int_value=block)}
        if stage == "denoiser":
            values["avatar.level"] = AnyValue(int_value=2)
        attributes = [KeyValue(key=key, value=value) for key, value in values.items()]
        return Span(attributes=attributes, start_time_unix_nano=start_s * SECOND, end_time_unix_nano=end_s * SECOND)

    work = bars([span("vae", 0, 9, 10), Span(name="a session"), span("denoiser", 0, 1, 4), span("audio", 1, 2, 3)])
    assert [each.row for each in work] == ["denoiser-2", "audio", "vae"]
    assert work[0] == Bar("denoiser-2", 0, SECOND, 4 * SECOND)
    assert longest_gap_s(work, SECOND, 10 * SECOND) == 5


def test_the_picture_has_a_row_for_each_stage(tmp_path: Path) -> None:
    work = [
        Bar("audio", 0, 0, SECOND),
        Bar("denoiser-0", 0, SECOND, 9 * SECOND),
        Bar("vae", 0, 9 * SECOND, 10 * SECOND),
    ]
    draw(tmp_path / "timeline.png", work, [(0, "start"), (10 * SECOND, "end")])
    with Image.open(tmp_path / "timeline.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 16) or []}
    assert (0x4E, 0x79, 0xA7) in colours
