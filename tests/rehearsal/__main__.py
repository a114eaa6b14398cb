"""Rehearse both layouts, and draw what happened: `python -m tests.rehearsal [--out out/rehearsal]`."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from tests import published
from tests.rehearsal.suite import LAYOUTS, run
from tests.rehearsal.timeline import draw, longest_gap_s

PICTURE = Path(__file__).parents[2] / "assets/portrait.png"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/rehearsal"), help="folder of pictures and logs")
    parser.add_argument("--only", choices=LAYOUTS, nargs="+", default=[*LAYOUTS])
    flags = parser.parse_args()
    with TemporaryDirectory() as name:
        checkpoint = Path(name) / "Wan2.2-S2V-14B"
        published.write(checkpoint)
        for layout in flags.only:
            found = run(layout, checkpoint, flags.out / layout, PICTURE.read_bytes())
            draw(flags.out / f"{layout}.png", found.work, found.events)
            gap_s = longest_gap_s(found.work, found.work[0].start_ns, found.work[-1].end_ns)
            print(f"{layout}: {len(found.work)} steps, longest gap {gap_s:.1f} s, statuses {found.statuses}")
            print(*(f"  {(at_ns - found.events[0][0]) / 1e9:6.1f} s  {text}" for at_ns, text in found.events), sep="\n")


if __name__ == "__main__":
    main()
