"""A picture of a suite's work: a row for each stage and level, a bar for each block, a line for each event."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opentelemetry.proto.trace.v1.trace_pb2 import Span
from PIL import Image, ImageDraw

WIDTH, ROW, LABEL, EVENT = 1800, 26, 130, 14
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2")


@dataclass(frozen=True)
class Bar:
    """A block's step at a stage; wall clock in nanoseconds."""

    row: str
    block: int
    start_ns: int
    end_ns: int


def bars(spans: Sequence[Span]) -> list[Bar]:
    """Return the bars of the spans of blocks, in order of time."""
    found = []
    for span in spans:
        values = {each.key: each.value for each in span.attributes}
        if "avatar.block.index" in values:
            level = f"-{values['avatar.level'].int_value}" if "avatar.level" in values else ""
            row = values["avatar.stage"].string_value + level
            block = values["avatar.block.index"].int_value
            found.append(Bar(row, block, span.start_time_unix_nano, span.end_time_unix_nano))
    return sorted(found, key=lambda each: each.start_ns)


def longest_gap_s(work: Sequence[Bar], since_ns: int, until_ns: int) -> float:
    """Return the longest time in which no stage worked, in seconds."""
    busy_ns, longest_ns = since_ns, 0
    for each in work:
        if since_ns <= each.start_ns <= until_ns:
            longest_ns = max(longest_ns, each.start_ns - busy_ns)
            busy_ns = max(busy_ns, each.end_ns)
    return longest_ns / 1e9


def draw(path: Path, work: Sequence[Bar], events: Sequence[tuple[int, str]]) -> None:
    """Write the picture to a PNG file. events: wall clock in nanoseconds, and what happened then."""
    rows = sorted({each.row for each in work}, key=lambda row: (row != "audio", row in ("vae", "encode"), row))
    first_ns = min([each.start_ns for each in work] + [at_ns for at_ns, _ in events])
    last_ns = max([each.end_ns for each in work] + [at_ns for at_ns, _ in events])
    top = EVENT * (len(events) + 2)
    picture = Image.new("RGB", (WIDTH, top + ROW * len(rows) + 30), "white")
    canvas = ImageDraw.Draw(picture)

    def x(at_ns: int) -> float:
        return LABEL + (at_ns - first_ns) / max(1, last_ns - first_ns) * (WIDTH - LABEL - 20)

    for number, row in enumerate(rows):
        canvas.text((6, top + ROW * number + 6), row, "black")
    for each in work:
        y = top + ROW * rows.index(each.row)
        box = (x(each.start_ns), y + 3, max(x(each.end_ns), x(each.start_ns) + 1), y + ROW - 3)
        canvas.rectangle(box, COLOURS[each.block % len(COLOURS)])
        if box[2] - box[0] > 14:
            canvas.text((box[0] + 2, y + 6), str(each.block), "white")
    for number, (at_ns, text) in enumerate(events):
        y = EVENT * (number + 1)
        canvas.line((x(at_ns), y, x(at_ns), picture.height - 24), "#888888")
        label = f"{(at_ns - first_ns) / 1e9:.1f} s {text}"
        canvas.text((min(x(at_ns) + 3, WIDTH - 7 * len(label)), y), label, "black")
    for second in range(0, int((last_ns - first_ns) / 1e9) + 1, 5):
        canvas.text((x(first_ns + second * 10**9), picture.height - 18), f"{second} s", "#555555")
    picture.save(path)
