"""The two layouts of a checkpoint's folder, and the parts that either is made of.

Ours has a folder for each part, with config.json and safetensors: `audio`, `denoiser`, `vae`, and `text` with its
tokenizer.json where prompts are known. The published one of Wan2.2-S2V-14B is taken as it is:

    config.json, diffusion_pytorch_model-*.safetensors and their index    denoiser
    Wan2.1_VAE.pth                                                        vae
    wav2vec2-large-xlsr-53-english/                                       audio
    models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl/tokenizer.json    text

Live Avatar's adapter is a file of its own, wherever it is.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from avatar.checkpoints.files import CONFIG, TOKENIZER, read_config, read_outlines, weight_files
from avatar.checkpoints.lora import LoraAdapter
from avatar.checkpoints.part import Part

# What every checkpoint has.
PARTS = ("audio", "denoiser", "vae")
TEXT = "text"
CLASS_NAME = "WanModel_S2V"
VAE_FILE = "Wan2.1_VAE.pth"
AUDIO_FOLDER = "wav2vec2-large-xlsr-53-english"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = Path("google/umt5-xxl")
# What the published weights were trained for is not in their config.json, and is not to be chosen there.
ROLLOUT = ("schedule", "sampler", "num_frames_per_block", "window_blocks", "sink_distance", "sink_update_block")
# Rate and largest size of the published weights' videos. Source: the scripts of the reference implementation.
FRAME_RATE_HZ = 25
AREA = 720 * 400
# Residual blocks of each of its VAE's levels.
VAE_RES_BLOCKS = 2


def open_part(checkpoint: Path, name: str, adapter: LoraAdapter | None = None) -> Part:
    """The part `audio`, `denoiser`, `vae` or `text` of a checkpoint in either layout; nothing is loaded.

    adapter: changes the denoiser. ValueError if the folder is no checkpoint, or the part's files are not there.
    """
    if name == TEXT and not has_text_encoder(checkpoint):
        raise ValueError(f"{checkpoint} knows no text: expected a folder {TEXT}, or {TEXT_FILE} as it is published")
    if is_published(checkpoint):
        part = PUBLISHED[name](checkpoint)
    elif (checkpoint / name).is_dir():
        part = Part.read(checkpoint / name)
        if name == TEXT:
            part = replace(part, tokenizer=_tokenizer(checkpoint / name))
    else:
        ours, published = f"a folder {name}", f"the {CONFIG} of {CLASS_NAME}"
        raise ValueError(f"no checkpoint at {checkpoint}: expected {ours}, or {published} as it is published")
    return replace(part, adapter=adapter) if name == "denoiser" else part


def parts_of(checkpoint: Path) -> tuple[str, ...]:
    """The names of a checkpoint's parts."""
    return (*PARTS, TEXT) if has_text_encoder(checkpoint) else PARTS


def has_text_encoder(checkpoint: Path) -> bool:
    """Whether the checkpoint has a part for prompts, which are refused where it has none."""
    return (checkpoint / TEXT_FILE if is_published(checkpoint) else checkpoint / TEXT).exists()


def is_published(checkpoint: Path) -> bool:
    """Whether the folder is in the published layout. ValueError if it holds another network."""
    if not (checkpoint / CONFIG).is_file():
        return False
    found = read_config(checkpoint).get("_class_name")
    if found != CLASS_NAME:
        raise ValueError(f"{checkpoint / CONFIG} is of a {found}, expected {CLASS_NAME}")
    return True


def _denoiser(checkpoint: Path) -> Part:
    config = read_config(checkpoint)
    if chosen := [name for name in ROLLOUT if name in config]:
        raise ValueError(
            f"{checkpoint / CONFIG} sets {', '.join(chosen)}; published weights are served at the levels and in the "
            "blocks that they were trained for"
        )
    return Part(checkpoint, config, tuple(weight_files(checkpoint)))


def _vae(checkpoint: Path) -> Part:
    """The file says nothing of its sizes: they are those of its tensors."""
    path = checkpoint / VAE_FILE
    if not path.is_file():
        raise ValueError(f"no VAE in {checkpoint}: expected a file {path}")
    first = dict(read_outlines(path)).get("encoder.conv1.weight")
    config = {
        "codec": "wan",
        "picture": {"fit": "reference", "area": AREA},
        "frame_rate_hz": FRAME_RATE_HZ,
        "network": {} if first is None else {"base_dim": len(first)},
    }
    return Part(checkpoint, config, (path,), vae_name)


def _audio(checkpoint: Path) -> Part:
    folder = checkpoint / AUDIO_FOLDER
    config: dict[str, Any] = {"encoder": "wav2vec2", "network": read_config(folder)}
    return Part(folder, config, tuple(weight_files(folder)), audio_name)


def _text(checkpoint: Path) -> Part:
    """The file says nothing of its sizes: they are those of its tensors."""
    path = checkpoint / TEXT_FILE
    shapes = {text_name(name): tuple(tensor.shape) for name, tensor in read_outlines(path)}
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
    """A tensor of wav2vec2 in today's Wav2Vec2Model; None for what belongs to training or to the model around it."""
    name = name.removeprefix("wav2vec2.")
    if name.split(".")[0] not in ("feature_extractor", "feature_projection", "encoder"):
        return None
    return WEIGHT_NORM.sub(lambda old: f"conv.parametrizations.weight.original{'gv'.index(old[1])}", name)


# Length and direction of the positional convolution's weights, as transformers named them before torch 2's names.
WEIGHT_NORM = re.compile(r"conv\.weight_([gv])$")


def vae_name(name: str) -> str:
    """The name under which AutoencoderKLWan knows a tensor of Wan's own checkpoint.

    diffusers' own conversion, of the same result, is private and takes whole files.
    """
    for pattern, part in _VAE_PARTS:
        name = re.sub(pattern, part, name)
    found = re.match(r"decoder\.upsamples\.(\d+)\.(.*)", name)
    if not found:
        return name
    # In a row there, per level here: the residual blocks and then the upsampler.
    level, place = divmod(int(found[1]), VAE_RES_BLOCKS + 2)
    layer = "upsamplers.0" if place > VAE_RES_BLOCKS else f"resnets.{place}"
    return f"decoder.up_blocks.{level}.{layer}.{found[2]}"


_VAE_PARTS = (
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
    """The name under which transformers' umT5 encoder stack knows a tensor of the published text encoder."""
    for pattern, part in _TEXT_PARTS:
        name = re.sub(pattern, part, name)
    return name


_TEXT_PARTS = (
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
    """The sizes of an umT5 encoder, as transformers.UMT5Config names them, from the shapes of its tensors.

    KeyError names a tensor that is missing.
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
