"""The two layouts of a checkpoint folder: ours and the published one.

Ours has a folder for each part, with config.json and safetensors: `audio`, `denoiser`, `vae` and, if the checkpoint
takes prompts, `text` with its tokenizer.json. The published layout of Wan2.2-S2V-14B is read as it is:

    config.json, diffusion_pytorch_model-*.safetensors and their index    denoiser
    Wan2.1_VAE.pth, or lightvaew2_1                                       vae
    wav2vec2-large-xlsr-53-english/                                       audio
    models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl/tokenizer.json    text

Live Avatar's LoRA adapter is a separate file, anywhere. In either layout, a decoder of its own
(`avatar.checkpoints.decoders`) may take the place of the VAE's.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from avatar.checkpoints.decoders import find_decoder, open_decoder
from avatar.checkpoints.files import CLASS_NAME, CONFIG, TOKENIZER, read_config, read_meta_tensors, weight_files
from avatar.checkpoints.lora import LoraAdapter
from avatar.checkpoints.part import Part
from avatar.types import BLOCK_LATENTS, MAX_BLOCK_LATENTS

# The parts of every checkpoint.
PARTS = ("audio", "denoiser", "vae")
TEXT = "text"
VAE_FILE = "Wan2.1_VAE.pth"
# Files that hold the VAE under Wan's names; lightvaew2_1 has a quarter of its widths.
VAE_FILES = (VAE_FILE, "Wan2.1_VAE.safetensors", "lightvaew2_1.pth", "lightvaew2_1.safetensors")
AUDIO_FOLDER = "wav2vec2-large-xlsr-53-english"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = Path("google/umt5-xxl")
# Fields that a published config.json must not set: they are fixed by the training of the published weights.
ROLLOUT = (
    *("schedule", "trained_schedule", "sampler", "num_frames_per_block", "window_latents", "window_blocks"),
    *("sink_distance", "sink_update_block"),
)
# Frame rate and largest area of the published weights' videos. Source: the scripts of the reference implementation.
FRAME_RATE_HZ = 25
AREA = 720 * 400
PICTURE = {"fit": "reference", "area": AREA}
# Residual blocks of each of its VAE's levels.
VAE_RES_BLOCKS = 2


def open_part(checkpoint: Path, name: str, adapter: LoraAdapter | None = None, *, decoder: Path | None = None) -> Part:
    """Return the part `audio`, `denoiser`, `vae` or `text` of a checkpoint in either layout; nothing is loaded.

    adapter: to merge into the denoiser. decoder: file or folder of the decoder that takes the place of the VAE's; None:
    the one in the checkpoint's folder, if there is one. ValueError if the folder is no checkpoint, or files of the part
    are missing.
    """
    if name == TEXT and not has_text_encoder(checkpoint):
        raise ValueError(f"{checkpoint} has no text encoder: expected a folder {TEXT}, or {TEXT_FILE} as published")
    if is_published(checkpoint):
        part = PUBLISHED[name](checkpoint)
    elif (checkpoint / name).is_dir():
        part = Part.read(checkpoint / name)
        if name == TEXT:
            part = replace(part, tokenizer=_tokenizer(checkpoint / name))
    else:
        ours, published = f"a folder {name}", f"the {CONFIG} of {CLASS_NAME}"
        raise ValueError(f"no checkpoint at {checkpoint}: expected {ours}, or {published} as published")
    part = replace(part, block_latents=block_latents(checkpoint))
    if name == "vae" and (path := decoder or find_decoder(checkpoint)):
        part = replace(part, decoder=open_decoder(path))
    return replace(part, adapter=adapter) if name == "denoiser" else part


def block_latents(checkpoint: Path) -> int:
    """Return the latent frames of a checkpoint's blocks: all its parts follow the denoiser's `num_frames_per_block`.

    ValueError unless they are 1 to MAX_BLOCK_LATENTS. A folder without a denoiser has blocks of BLOCK_LATENTS.
    """
    folder, config = _denoiser_config(checkpoint)
    stated = config.get("num_frames_per_block", BLOCK_LATENTS)
    if type(stated) is not int or not 1 <= stated <= MAX_BLOCK_LATENTS:
        raise ValueError(f"num_frames_per_block in {folder} is {stated!r}, expected 1 to {MAX_BLOCK_LATENTS}")
    return stated


def listens(checkpoint: Path) -> bool:
    """Return True if the checkpoint's network takes features of the other person's audio."""
    return bool(_denoiser_config(checkpoint)[1].get("heard_inject_layers"))


def _denoiser_config(checkpoint: Path) -> tuple[Path, dict[str, Any]]:
    """Return the denoiser's folder and its configuration, which is empty if the folder has none."""
    folder = checkpoint if is_published(checkpoint) else checkpoint / "denoiser"
    return folder, read_config(folder) if (folder / CONFIG).is_file() else {}


def part_names(checkpoint: Path) -> tuple[str, ...]:
    """Return the names of a checkpoint's parts."""
    return (*PARTS, TEXT) if has_text_encoder(checkpoint) else PARTS


def has_text_encoder(checkpoint: Path) -> bool:
    """Return True if the checkpoint has a text encoder; otherwise sessions with prompts are refused."""
    return (checkpoint / TEXT_FILE if is_published(checkpoint) else checkpoint / TEXT).exists()


def is_published(checkpoint: Path) -> bool:
    """Return True if the folder is in the published layout. ValueError if it holds another network."""
    if not (checkpoint / CONFIG).is_file():
        return False
    found = read_config(checkpoint).get("_class_name")
    if found != CLASS_NAME:
        raise ValueError(f"{checkpoint / CONFIG} describes a {found}, expected {CLASS_NAME}")
    return True


def _denoiser(checkpoint: Path) -> Part:
    config = read_config(checkpoint)
    if chosen := [name for name in ROLLOUT if name in config]:
        raise ValueError(
            f"{checkpoint / CONFIG} sets {', '.join(chosen)}; published weights run only with the levels and blocks "
            "that they were trained for"
        )
    return Part(checkpoint, config, tuple(weight_files(checkpoint)))


def _vae(checkpoint: Path) -> Part:
    # The file has no configuration: sizes come from the shapes of its tensors.
    path = next((checkpoint / name for name in VAE_FILES if (checkpoint / name).is_file()), None)
    if path is None:
        raise ValueError(f"no VAE in {checkpoint}: expected a file {checkpoint / VAE_FILE}")
    first = dict(read_meta_tensors(path)).get("encoder.conv1.weight")
    config = {
        "codec": "wan",
        "picture": PICTURE,
        "frame_rate_hz": FRAME_RATE_HZ,
        "network": {} if first is None else {"base_dim": len(first)},
    }
    return Part(checkpoint, config, (path,), vae_name)


def _audio(checkpoint: Path) -> Part:
    folder = checkpoint / AUDIO_FOLDER
    config: dict[str, Any] = {"encoder": "wav2vec2", "network": read_config(folder)}
    return Part(folder, config, tuple(weight_files(folder)), audio_name)


def _text(checkpoint: Path) -> Part:
    # As for the VAE, sizes come from the shapes of the tensors.
    path = checkpoint / TEXT_FILE
    shapes = {text_name(name): tuple(tensor.shape) for name, tensor in read_meta_tensors(path)}
    try:
        config: dict[str, Any] = {"encoder": "umt5", "network": text_sizes(shapes)}
    except KeyError as error:
        raise ValueError(f"weights in {path} are not those of a text encoder: missing {error.args[0]}") from error
    if rows := read_config(checkpoint).get("text_len"):
        config["max_tokens"] = rows
    return Part(checkpoint, config, (path,), text_name, tokenizer=_tokenizer(checkpoint / TOKENIZER_FOLDER))


def _tokenizer(folder: Path) -> Path:
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(f"no tokenizer for text in {folder}: expected a file {path}")
    return path


PUBLISHED: dict[str, Callable[[Path], Part]] = {"audio": _audio, "denoiser": _denoiser, "vae": _vae, TEXT: _text}


def audio_name(name: str) -> str | None:
    """Map a published wav2vec2 tensor to today's Wav2Vec2Model; None for tensors of training or of the CTC head."""
    name = name.removeprefix("wav2vec2.")
    if name.split(".")[0] not in ("feature_extractor", "feature_projection", "encoder"):
        return None
    return WEIGHT_NORM.sub(lambda old: f"conv.parametrizations.weight.original{'gv'.index(old[1])}", name)


# Weight norm's length (g) and direction (v) of the positional convolution, as transformers named them before torch 2.
WEIGHT_NORM = re.compile(r"conv\.weight_([gv])$")


def vae_name(name: str) -> str:
    """Map a tensor of Wan's own VAE checkpoint to its name in diffusers' AutoencoderKLWan.

    diffusers' own conversion gives the same result, but is private and takes whole files.
    """
    for pattern, replacement in _VAE_NAMES:
        name = re.sub(pattern, replacement, name)
    found = re.match(r"decoder\.upsamples\.(\d+)\.(.*)", name)
    if not found:
        return name
    # One list there; here a list per level, of the residual blocks and then the upsampler.
    level, index = divmod(int(found[1]), VAE_RES_BLOCKS + 2)
    layer = "upsamplers.0" if index > VAE_RES_BLOCKS else f"resnets.{index}"
    return f"decoder.up_blocks.{level}.{layer}.{found[2]}"


_VAE_NAMES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"^encoder\.downsamples\.", "encoder.down_blocks."),
)


def text_name(name: str) -> str:
    """Map a tensor of the published text encoder to its name in transformers' umT5 encoder stack."""
    for pattern, replacement in _TEXT_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


_TEXT_NAMES = (
    (r"^token_embedding\.", "embed_tokens."),
    (r"^norm\.", "final_layer_norm."),
    (r"^blocks\.", "block."),
    (r"\.norm1\.", ".layer.0.layer_norm."),
    (r"\.attn\.", ".layer.0.SelfAttention."),
    (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
    (r"\.norm2\.", ".layer.1.layer_norm."),
    (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."),
    (r"\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
    (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
)


def text_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the sizes of a umT5 encoder under transformers.UMT5Config's names, from the shapes of its tensors.

    KeyError names a missing tensor.
    """
    vocabulary, width = shapes["embed_tokens.weight"]
    buckets, heads = shapes["block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes["block.0.layer.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes["block.0.layer.1.DenseReluDense.wi_1.weight"][0],
        "num_layers": sum(name.endswith(".SelfAttention.q.weight") for name in shapes),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }
