"""The golden of text: cleaning, and the encoder under its public names."""

from collections.abc import Callable

from avatar.text.prompt import clean
from avatar.text.umt5 import TextConfig, build, encode, module_name, sizes
from tests.parity.goldens import Golden, Report

WEIGHTS = "weights/"


def umt5_tiny(golden: Golden, report: Report) -> None:
    """Padded tokens to all rows, and the rows of each text's own tokens."""
    info, tensors = golden.info, golden.tensors
    for case in info["cleaning"]:
        report.exact(f"clean {case['text']!r}", clean(case["text"]), case["clean"])

    weights = {name.removeprefix(WEIGHTS): each for name, each in tensors.items() if name.startswith(WEIGHTS)}
    network = build(TextConfig(network=sizes({name: tuple(each.shape) for name, each in weights.items()})))
    network.load_state_dict({module_name(name): each for name, each in weights.items()}, assign=True)
    rows = encode(network.eval(), tensors["ids"], tensors["mask"])
    report.compare("hidden_padded", rows, tensors["hidden_padded"], max_abs=info["tolerance"])
    for i, length in enumerate(info["lengths"]):
        report.exact(f"length {i}", int(tensors["mask"][i].sum()), length)
        report.compare(f"context/{i}", rows[i, :length], tensors[f"context/{i}"], max_abs=info["tolerance"])


RUNNERS: dict[str, Callable[[Golden, Report], None]] = {"umt5_tiny": umt5_tiny}
