"""Decoders in files of their own: the tiny decoders of Wan 2.1 latents, `taew2_1` and `lighttaew2_1`.

A decoder is a file in the published layout, or a folder with such a file. Shapes show that it is one of the two, but
not which: one takes normalised latents, the other raw ones. The folder's config.json says it under `latents`, or else
the file's name.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from avatar.checkpoints.files import CONFIG, read_config, read_meta_tensors, weight_files
from avatar.checkpoints.part import Part

# A folder of a checkpoint in our layout.
DECODER = "decoder"
# Names of published decoders, and the latents that they take. The longer name contains the other one.
LATENTS = {"lighttaew2_1": "raw", "taew2_1": "normalised"}
SUFFIXES = (".safetensors", ".pth")
CHANNELS = 16
# Other decoders of the family: by channels of their latents, and, where the shapes are the same, by name.
BY_CHANNELS = {
    24: "taeh3",
    32: "taehv1_5 or lighttaehy1_5, of HunyuanVideo 1.5",
    48: "taew2_2 or lighttaew2_2, of Wan 2.2",
    128: "taeltx, of LTX-Video",
}
BY_NAME = {"taehv": "HunyuanVideo", "taecvx": "CogVideoX", "taeos1_3": "Open-Sora 1.3"}


def find_decoder(checkpoint: Path) -> Path | None:
    """Return the decoder in a checkpoint's folder: the folder `decoder`, or a file with a published name; None if none.

    ValueError if there are several.
    """
    found = [checkpoint / DECODER] if (checkpoint / DECODER).is_dir() else []
    return _only([*found, *_published_files(checkpoint), *_published_files(checkpoint / "vae")], checkpoint)


def _published_files(folder: Path) -> list[Path]:
    """Return a folder's decoders with published names, one file of each."""
    found = []
    for name in LATENTS:
        files = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
        found += [path for path in files if path.is_file()][:1]
    return found


def _only(found: list[Path], folder: Path) -> Path | None:
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise ValueError(f"{folder} has several decoders: {names}; remove all but one, or name the one to use")
    return found[0] if found else None


def open_decoder(path: Path) -> Part:
    """Return the part of a decoder, a file or a folder; nothing is loaded.

    ValueError if it is no tiny decoder of Wan 2.1 latents, with what it is, or if nothing says which latents it takes.
    """
    config: dict[str, Any] = read_config(path) if (path / CONFIG).is_file() else {}
    files = [path]
    if path.is_dir():
        file = _only(_published_files(path), path)
        files = [file] if file else weight_files(path)
    part = Part(path, config, tuple(files), decoder_name)
    shapes = {name: tuple(tensor.shape) for file in files for name, tensor in read_meta_tensors(file)}
    if reason := unfit(shapes):
        raise ValueError(f"{files[0]} {reason}; expected taew2_1 or lighttaew2_1, the tiny decoders of Wan 2.1")
    return part if "latents" in config else replace(part, config={**config, "latents": latents_by_name(files[0])})


def decoder_name(name: str) -> str | None:
    """Return the module's name of a published tensor; None for the encoder's, which are not needed."""
    return None if name.startswith("encoder.") else name


def latents_by_name(path: Path) -> str:
    """Return the latents that a published file takes, by its name. ValueError if the name does not say it."""
    name = path.stem.lower()
    for known, latents in LATENTS.items():
        if known in name:
            return latents
    for known, model in BY_NAME.items():
        if known in name:
            raise ValueError(f"{path} is by its name a decoder for {model}, whose latents are not those of Wan 2.1")
    raise ValueError(
        f"{path} has the shapes of a tiny decoder, but neither they nor its name say which latents it takes: call it "
        "taew2_1 (normalised latents) or lighttaew2_1 (raw latents), or put it into a folder whose config.json has "
        '{"latents": "normalised"} or {"latents": "raw"}'
    )


def unfit(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return what a file holds in place of a tiny decoder of Wan 2.1 latents, by its shapes; empty if it fits.

    A sentence without its subject. Of the decoder's own tensors only some are looked at: loading compares all of them.
    """
    if "decoder.conv1.weight" in shapes or "encoder.conv1.weight" in shapes:
        return (
            "holds a VAE under Wan's names, such as Wan2.1_VAE or lightvaew2_1, which belongs into the checkpoint's "
            "folder in place of Wan2.1_VAE.pth"
        )
    if "decoder.conv_in.weight" in shapes:
        return "holds a VAE under diffusers' names"
    if "decoder.0.weight" in shapes:
        return "holds a `super` variant of a tiny decoder, whose blocks are others"
    first, last = shapes.get("decoder.1.weight", ()), shapes.get("decoder.22.weight", ())
    if len(first) == 5:
        return "holds a decoder that convolves in time, which is not of this family"
    if len(first) != 4 or not any(re.match(r"decoder\.\d+\.conv\.0\.weight$", name) for name in shapes):
        return "holds no decoder of latents that is known here"
    if first[1] != CHANNELS:
        other = BY_CHANNELS.get(first[1], "unknown here")
        return f"holds a decoder of latents with {first[1]} channels ({other})"
    if last and last[0] != 3:
        return f"holds a tiny decoder with patches: it has {last[0]} outputs a pixel and not 3"
    return ""
