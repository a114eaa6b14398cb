"""The README's lines of Python make the film that they promise."""

import re
from pathlib import Path

import av
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_readmes_three_lines_make_a_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(list(filter(None, code.splitlines()))) == 3
    for folder in ("assets", "models"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    with av.open(str(tmp_path / "film.mp4")) as film:
        assert (film.streams.video[0].frames, film.streams.audio[0].rate) == (221, 48000)
