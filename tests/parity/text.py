"""Golden of text: prompt cleaning, and the encoder of a published checkpoint."""

from collections.abc import Callable

import torch

from avatar.checkpoints.layouts import TEXT_FILE, open_part
from avatar.text.model import encode, load
from avatar.text.prompt import clean
from tests.parity.goldens import Golden, Report, published
from tests.text.tiny import write_tokenizer

WEIGHTS = "weights/"


def umt5_tiny(golden: Golden, report: Report) -> None:
    """Padded tokens to all embeddings, and to those of each text's own tokens."""
    info, tensors = golden.info, golden.tensors
    for case in info["cleaning"]:
        report.exact(f"clean {case['text']!r}", clean(case["text"]), case["clean"])

    weights = {name.removeprefix(WEIGHTS): each for name, each in tensors.items() if name.startswith(WEIGHTS)}
    with published() as checkpoint:
        torch.save(weights, checkpoint / TEXT_FILE)
        write_tokenizer(checkpoint)
        encoder = load(open_part(checkpoint, "text"))
    rows = encode(encoder.network, tensors["ids"], tensors["mask"])
    report.compare("hidden_padded", rows, tensors["hidden_padded"], max_abs=info["tolerance"])
    for i, length in enumerate(info["lengths"]):
        report.exact(f"length {i}", int(tensors["mask"][i].sum()), length)
        report.compare(f"context/{i}", rows[i, :length], tensors[f"context/{i}"], max_abs=info["tolerance"])


RUNNERS: dict[str, Callable[[Golden, Report], None]] = {"umt5_tiny": umt5_tiny}
