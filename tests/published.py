"""A checkpoint in the published layout with every published name and tiny tensors.

It has all 1,260 names of the network in two shards, 194 of the VAE, wav2vec2's with the CTC head and the older
spellings, umT5's, and the adapter's 896. Only widths are smaller.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from avatar.audio.wav2vec2 import Wav2Vec2, Wav2Vec2Config, large
from avatar.checkpoints.files import CLASS_NAME
from avatar.checkpoints.layouts import AUDIO_FOLDER, VAE_FILE, vae_name
from avatar.checkpoints.lora import TARGET
from avatar.denoiser.config import NetworkConfig, base
from avatar.denoiser.model import Network
from avatar.vae.wan import WanCodec, WanConfig

ADAPTER = "liveavatar.safetensors"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = Path("google/umt5-xxl/tokenizer.json")
WIDTH, TEXT_WIDTH, RANK, TEXT_LAYERS = 32, 16, 4, 24


def small() -> NetworkConfig:
    """Return the public network's configuration with small widths."""
    return replace(
        base(), dim=WIDTH, num_heads=2, ffn_dim=48, freq_dim=16, text_dim=TEXT_WIDTH, text_len=8, audio_dim=WIDTH
    )


def write(folder: Path, seed: int = 0) -> None:
    """Write the whole checkpoint, the adapter in the same folder."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_network(folder)
    write_vae(folder)
    write_audio(folder / AUDIO_FOLDER)
    write_text(folder)


def filled(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's tensors with random values, none of which silences a path."""
    state = module.state_dict()
    for name, tensor in state.items():
        is_scale = ("norm" in name and name.endswith("weight")) or name.endswith("gamma")
        fan = tensor[0].numel() if tensor.ndim > 1 else 16
        state[name] = torch.randn(tensor.shape) / fan**0.5 * (0.1 if is_scale else 1) + is_scale
    return state


def write_network(folder: Path) -> None:
    config = small()
    with torch.device("meta"):
        network = Network(config)
    tensors = {name: tensor.bfloat16() for name, tensor in filled(network).items()}
    names = sorted(tensors)
    where: dict[str, str] = {}
    for number, shard in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in shard}, folder / file)
        where.update(dict.fromkeys(shard, file))
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    # The fields of the published file, and the widths that it leaves to the class.
    sizes = ("dim", "num_heads", "num_layers", "ffn_dim", "freq_dim", "text_len", "text_dim", "audio_dim", "cond_dim")
    written = ("audio_inject_layers", "eps", "in_dim", "out_dim", "num_audio_token")
    flags = {"enable_adain": True, "adain_mode": "attn_norm", "enable_framepack": True, "zero_timestep": True}
    unused = {"enable_tsm": False, "trainable_token_pos_emb": False, "motion_token_num": 1024, "zero_init": True}
    fields = {name: getattr(config, name) for name in (*sizes, *written)}
    write_json(folder / "config.json", {"_class_name": CLASS_NAME, "model_type": "s2v", **fields, **flags, **unused})
    write_adapter(folder / ADAPTER, tensors)


def write_adapter(path: Path, weights: Mapping[str, Tensor], prefix: str = "", infix: str = ".default") -> None:
    """Write a pair of matrices for each weight that LoRA targets, keys spelled with prefix and infix."""
    pairs: dict[str, Tensor] = {}
    for name in weights:
        if TARGET.search(name):
            outputs, inputs = weights[name].shape
            module = prefix + name.removesuffix(".weight")
            pairs[f"{module}.lora_A{infix}.weight"] = (torch.randn(RANK, inputs) / inputs**0.5).bfloat16()
            pairs[f"{module}.lora_B{infix}.weight"] = (torch.randn(outputs, RANK) * 0.02).bfloat16()
    save_file(pairs, path)


def write_vae(folder: Path) -> None:
    with torch.device("meta"):
        codec = WanCodec(WanConfig(base_dim=4), device="meta")
    torch.save(vae_as_published(filled(codec.network)), folder / VAE_FILE)


def vae_as_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename diffusers' tensors to the names of Wan's own checkpoint."""
    names = {vae_name(name): name for name in possible_vae_names()}
    return {names[name]: tensor for name, tensor in tensors.items()}


def possible_vae_names() -> list[str]:
    """Return every name that Wan's own checkpoint could have, for lists of up to 30 modules."""
    rows = [*(f"middle.{i}" for i in range(3)), *(f"{way}samples.{i}" for way in ("down", "up") for i in range(30))]
    layers = [*(f"residual.{i}" for i in (0, 2, 3, 6)), "shortcut", "resample.1", "time_conv", "norm", "to_qkv", "proj"]
    stems = ["conv1", "conv2"]
    for side in ("encoder", "decoder"):
        stems += [f"{side}.conv1", f"{side}.head.0", f"{side}.head.2"]
        stems += [f"{side}.{row}.{layer}" for row, layer in product(rows, layers)]
    return [f"{stem}.{kind}" for stem, kind in product(stems, ("weight", "bias", "gamma"))]


def write_audio(folder: Path, pickled: bool = True, prefix: str = "wav2vec2.", old: bool = True) -> None:
    """Write wav2vec2 with its CTC head, as pickle or safetensors, with the old or today's names of weight norm."""
    folder.mkdir(parents=True, exist_ok=True)
    narrow = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 48, "conv_dim": [8] * 7}
    config = {**large().network, **narrow}
    with torch.device("meta"):
        encoder = Wav2Vec2(Wav2Vec2Config(network=config))
    tensors = {prefix + (old_name(name) if old else name): tensor for name, tensor in filled(encoder.network).items()}
    tensors |= {"lm_head.weight": torch.randn(33, WIDTH), f"{prefix}masked_spec_embed": torch.randn(WIDTH)}
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    around = {"architectures": ["Wav2Vec2ForCTC"], "model_type": "wav2vec2", "vocab_size": 33, "mask_time_prob": 0.05}
    write_json(folder / "config.json", {**config, **around, "layerdrop": 0.05, "transformers_version": "4.7.0.dev0"})


def old_name(name: str) -> str:
    """Return transformers' name from before torch had parametrizations."""
    return re.sub(r"conv\.parametrizations\.weight\.original([01])", lambda m: f"conv.weight_{'gv'[int(m[1])]}", name)


def write_text(folder: Path) -> None:
    """Write umT5's encoder under its published names, and a tokenizer of a few words."""
    words = ["<pad>", "</s>", "<unk>", "a", "person", "speaks"]
    width, inner, heads = TEXT_WIDTH, 24, 2
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (len(words), width), "norm.weight": (width,)}
    for layer in range(TEXT_LAYERS):
        block = f"blocks.{layer}"
        shapes |= {f"{block}.attn.{each}.weight": (width, width) for each in "qkvo"}
        shapes |= {f"{block}.{each}.weight": (width,) for each in ("norm1", "norm2")}
        shapes |= {f"{block}.ffn.{each}.weight": (inner, width) for each in ("gate.0", "fc1")}
        shapes |= {f"{block}.ffn.fc2.weight": (width, inner)}
        shapes |= {f"{block}.pos_embedding.embedding.weight": (32, heads)}
    torch.save({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, folder / TEXT_FILE)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    (folder / TOKENIZER).parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / TOKENIZER))


def write_json(path: Path, fields: Mapping[str, object]) -> None:
    path.write_text(json.dumps(fields, indent=2), encoding="utf-8")
