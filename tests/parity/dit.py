"""Goldens of the network, its parts and the schedule: our modules run with the recorded weights and inputs."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from avatar.denoiser.attention import (
    apply_rope,
    axis_frequencies,
    block_positions,
    condition_positions,
    grid_size,
    reference_frame,
    rope_table,
)
from avatar.denoiser.audio_injection import AudioAdaLN, AudioTokens, CausalAudioEncoder
from avatar.denoiser.cache import KeysValues, KVCache
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.layers import FramePacker, Head, Layer, timestep_embedding, unpatchify
from avatar.denoiser.model import Network
from avatar.denoiser.sampler import euler_step, flow_match_schedule, timesteps
from avatar.types import FRAMES_PER_LATENT
from tests.parity.goldens import Golden, Report

Module = TypeVar("Module", bound=nn.Module)
# Relative RMS by which bfloat16 may move a result. Emulated on the reference it moves velocities by 6e-3 to 8e-3.
HALF_PRECISION = 2e-2
# Recorded places that ours has no counterpart of: modulation before a layer's own part is added.
NOT_EXPOSED = {"layer0.e0"}


def run_calls(golden: Golden, report: Report, dtype: torch.dtype = torch.float32) -> None:
    """Prefill, streaming blocks and snapshots in the recorded order."""
    network = with_weights(Network(config_of(golden)), golden.tensors, "weights.")
    Replay(golden, report, network.to(dtype)).run()


def config_of(golden: Golden) -> NetworkConfig:
    frames = golden.info["layout"]["frames_per_block"]
    config = NetworkConfig.from_dict(golden.info["config"])
    return replace(config, num_frames_per_block=frames, window_latents=frames * config.window_blocks)


@dataclass
class Level:
    """A recorded cache, and the conditions of its sink."""

    cache: KVCache
    text: list[KeysValues] = field(default_factory=list)
    conditions: list[KeysValues] = field(default_factory=list)


class Replay:
    """Replays the calls of one golden; each method is named for a kind of call."""

    def __init__(self, golden: Golden, report: Report, network: Network) -> None:
        """Tolerance and `window_dtype` (as in `KVCache`) may be changed before `run`."""
        self.report, self.tensors, self.info = report, golden.tensors, golden.info
        layout, self.tolerance = golden.info["layout"], golden.info["tolerance"]
        if network.dtype == torch.bfloat16:
            self.tolerance = {kind: {"rel_rms": HALF_PRECISION} for kind in self.tolerance}
        self.frames = layout["frames_per_block"]
        self.size = layout["latent_h"], layout["latent_w"]
        self.network, self.config = network, network.config
        self.window_dtype: torch.dtype | None = None
        self.seen = watch(self.network)
        self.levels: dict[str, Level] = {}
        self.moved: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(self) -> None:
        for call in self.info["calls"]:
            getattr(self, call["kind"])(call)

    def new_cache(self, call: dict[str, Any]) -> None:
        window_latents = call["cache_blocks"] * self.config.num_frames_per_block
        config = replace(self.config, window_latents=window_latents)
        cache = KVCache(config, *self.size, dtype=self.network.dtype, window_dtype=self.window_dtype)
        self.levels[call["cache"]] = level = Level(cache)
        self.report.exact("ring", level.cache.window(0)[0].shape[1], call["cache_tokens"])
        self.report.exact("conditions", len(condition_positions(*self.size)), call["cond_tokens"])

    def prefill(self, call: dict[str, Any]) -> None:
        level, get = self.levels[call["cache"]], self.tensors.__getitem__
        level.text = self.network.embed_text(get(call["context"])[None])
        level.conditions = self.network.prefill(get(call["ref"]), get(call["motion"]), level.text)
        level.cache.set_sink(level.conditions)
        places = {
            "patch_embedding": grid(self.seen["patch_embedding"], self.size),
            "text_embedding": self.seen["text_embedding"][0],
            "time_embedding": self.seen["time_embedding"][0].expand(2 * self.frames, -1),
            "time_projection": self.seen["time_projection"][0].expand(2 * self.frames, -1),
            "framepack.tokens": self.seen["frame_packer"][0],
            "layer0.input": self.seen["blocks.0.input"].flatten(0, 2),
            "layer0.output": self.seen["blocks.0"].flatten(0, 2),
            **table("layer0.rope", self.rope_table(condition_positions(*self.size))),
            **table("framepack.rope", self.rope_table(self.motion_positions())),
        }
        self.check_taps(call["id"], places)

    def block(self, call: dict[str, Any]) -> None:
        report, level = self.report, self.levels[call["cache"]]
        start = self.moved.get(call["x"], self.tensors.get(call["x"]))
        assert start is not None, call["x"]
        x = start.to(self.network.dtype)
        first_frame, t = call["start_frame"], self.tensors[call["t"]]
        reference = reference_frame(first_frame, call["relative_dist"])
        audio = self.audio(call)
        before = level.cache.window(0)[1].clone()
        level.cache.start_block(first_frame // self.frames, reference)
        modulation = self.network.embed_time(t)
        pose = self.tensors[call["cond_states"]].to(x.dtype)
        velocity = self.network(x[None], modulation, level.text, audio, pose, first_frame, level.cache)[0]
        report.compare(call["id"], velocity, self.tensors[call["velocity"]], **self.tolerance["velocity"])
        changed = (level.cache.window(0)[1] != before).flatten(2).any(-1)[0]
        report.exact(f"{call['id']} ring slot", int(changed.nonzero()[0]), call["ring_slot"])
        report.exact(f"{call['id']} reference", reference, call["ref_frame_position"])
        report.exact(f"{call['id']} keys", self.seen["keys"].shape[1], call["self_attention_keys"])
        if "x_next" in call:
            moved = euler_step(x, velocity, *self.sigmas(t))
            report.compare(call["x_next"], moved, self.tensors[call["x_next"]], **self.tolerance["velocity"])
            self.moved[call["x_next"]] = moved
        self.check_taps(call["id"], self.block_places(audio, first_frame, reference))

    def snapshot(self, call: dict[str, Any]) -> None:
        level, layer = self.levels[call["cache"]], call["layer"]
        held = dict(zip(("k", "v"), level.cache.window(layer), strict=True))
        held |= dict(zip(("cond_k", "cond_v"), level.conditions[layer], strict=True))
        for kind, name in call["tensors"].items():
            self.report.compare(name, held[kind][0], self.tensors[name], **self.tolerance["cache"])

    def audio(self, call: dict[str, Any]) -> AudioTokens:
        mask = self.tensors[call["mask"]] if "mask" in call else None
        if mask is not None:
            mask = rearrange(mask[:, : self.frames], "a t h w 1 -> 1 a t (h w) 1")
        return self.network.encode_audio(self.tensors[call["audio"]][None], mask)

    def sigmas(self, t: Tensor) -> tuple[float, float]:
        """Noise level of the timesteps t, and the next one, in the recorded schedule."""
        schedule = self.info["schedule"]
        level = schedule["timesteps"].index(t[0, 0].item())
        now, following = schedule["sigmas"][level : level + 2]
        return now, following

    def block_places(self, audio: AudioTokens, first_frame: int, reference: int) -> dict[str, Tensor]:
        seen, frames = self.seen, self.frames
        after = seen.get(f"blocks.{self.config.audio_inject_layers[0] + 1}.input", seen["head.input"])
        standing = block_positions(reference, 1, *self.size)
        return {
            "patch_embedding": grid(seen["patch_embedding"], self.size),
            "cond_encoder": grid(seen["cond_encoder"], self.size),
            "time_embedding": seen["time_embedding"][0],
            "time_projection": seen["time_projection"][0],
            "head.e": seen["time_embedding"][0],
            "audio.local": audio.local[0, 0],
            "audio.global": audio.overall[0, 0, :, None],
            "layer0.input": seen["blocks.0.input"].flatten(0, 2),
            "layer0.self_attn": seen["blocks.0.self_attn"][0],
            "layer0.cross_attn": seen["blocks.0.cross_attn"][0],
            "layer0.ffn": seen["blocks.0.ffn"].flatten(0, 2),
            "layer0.output": seen["blocks.0"].flatten(0, 2),
            "layer_last.output": seen[f"blocks.{self.config.num_layers - 1}"].flatten(0, 2),
            "inject0.adain": seen["audio_injector.injector_adain_layers.0"].flatten(0, 2),
            "inject0.attn": seen["audio_injector.injector.0"],
            "inject0.hidden_after": after.flatten(0, 2),
            "head.input": seen["head.input"].flatten(0, 2),
            "head.output": seen["head"].flatten(0, 2),
            **table("layer0.rope", self.rope_table(block_positions(first_frame, frames, *self.size))),
            **table("layer0.rope_cond", self.rope_table(torch.cat([standing, self.motion_positions()]))),
        }

    def rope_table(self, positions: Tensor) -> Tensor:
        return rope_table(positions, self.config.head_dim)

    def motion_positions(self) -> Tensor:
        rows, columns = grid_size(*self.size)
        return condition_positions(*self.size)[rows * columns :]

    def check_taps(self, call: str, places: dict[str, Tensor]) -> None:
        """Compare every recorded place of a call; of recorded rows that ours leaves out, the ones ours has."""
        prefix = f"tap.{call}."
        for name in (name for name in self.tensors if name.startswith(prefix)):
            place, expected = name.removeprefix(prefix), self.tensors[name]
            if place in NOT_EXPOSED:
                continue
            actual = places[place]
            if place.startswith("time"):  # The rows of timestep 0 come after the block's.
                expected = expected[: len(actual)]
            if place.startswith("audio"):  # The recording keeps the outputs that end within the padding.
                expected = expected[-len(actual) :]
            if "rope" in place:
                self.report.exact(name, actual, expected)
            else:
                self.report.compare(name, actual, expected, **self.tolerance["taps"])


def with_weights(module: Module, tensors: dict[str, Tensor], prefix: str) -> Module:
    """Load the tensors whose names start with the prefix into the module."""
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    module.load_state_dict(weights)
    return module.eval()


def watch(network: Network) -> dict[str, Tensor]:
    """Return a dict that always holds the last output of every module, and the inputs of layers, attention and head."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen[name] = output
            if isinstance(module, Layer | Head):
                seen[f"{name}.input"] = inputs[0]
            if name == "blocks.0.self_attn":
                seen["keys"] = inputs[1]

        return hook

    for name, module in network.named_modules():
        module.register_forward_hook(keep(name))
    return seen


def grid(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    return rearrange(tokens, "1 t (h w) d -> d t h w", h=grid_size(*size)[0])


def table(name: str, table: Tensor) -> dict[str, Tensor]:
    cosine, sine = parts(table)
    return {f"{name}.re": cosine, f"{name}.im": sine}


def parts(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of each pair of channels."""
    return table[0, ..., ::2], table[1, ..., 1::2]


def run_rope(golden: Golden, report: Report) -> None:
    tensors, meaning = golden.tensors, {name: each["meaning"] for name, each in golden.info["tensors"].items()}
    for width, split in golden.info["axis_split_complex"].items():
        head_dim, frequencies = int(width), axis_frequencies(int(width))
        report.exact(f"split of {width}", [len(each) for each in frequencies], split)
        first = 0
        for axis, frequency in enumerate(frequencies):
            key = f"hd{width}.{'thw'[axis]}"
            report.exact(f"{key}.inv_freq", frequency, tensors[f"{key}.inv_freq"])
            if f"{key}.re" in tensors:
                along = tensors["positions"] if axis == 0 else torch.arange(len(tensors[f"{key}.re"]))
                positions = torch.stack([along if axis == each else along * 0 for each in range(3)], dim=-1)
                table = rope_table(positions, head_dim)[..., 2 * first : 2 * (first + len(frequency))]
                check_table(report, tensors, key, table)
            first += len(frequency)
    for name in tensors:
        key = name.removesuffix(".re")
        if match := re.fullmatch(r"cond_pos\.(\d+)x(\d+)", name):
            report.exact(name, condition_positions(*map(int, match.groups())).int(), tensors[name])
        elif match := re.fullmatch(r"cond_table\.(\d+)x(\d+)\.hd(\d+)\.re", name):
            height, width_, head_dim = map(int, match.groups())
            check_table(report, tensors, key, rope_table(condition_positions(height, width_), head_dim))
        elif match := re.fullmatch(r"cond_table_shift(\d+)\.(\d+)x(\d+)\.hd(\d+)\.ref_every(\d+)\.re", name):
            shift, height, width_, head_dim, stride = map(int, match.groups())
            frame = condition_positions(height, width_)[0, 0].item() + shift
            table = rope_table(block_positions(int(frame), 1, height, width_), head_dim)
            check_table(report, tensors, key, table[:, ::stride])
        elif match := re.fullmatch(r"noisy_table\.f(\d+)\.re", name):
            check_table(report, tensors, key, noisy_table(meaning[name], len(tensors[name])))
    start = re.search(r"start frame (\d+)", meaning["apply.out"])
    assert start
    table = noisy_table(meaning[f"noisy_table.f{start[1]}.re"], tensors["apply.x"].shape[1])
    report.compare(
        "apply", apply_rope(tensors["apply.x"], table), tensors["apply.out"], **golden.info["tolerance"]["taps"]
    )


def noisy_table(meaning: str, tokens: int) -> Tensor:
    """Return the rope table of a block, from its recorded description."""
    match = re.search(r"latent (\d+)x(\d+), head_dim (\d+), start frame (\d+)", meaning)
    assert match, meaning
    height, width, head_dim, start = map(int, match.groups())
    rows, columns = grid_size(height, width)
    return rope_table(block_positions(start, tokens // (rows * columns), height, width), head_dim)


def check_table(report: Report, tensors: dict[str, Tensor], key: str, table: Tensor) -> None:
    for name, part in zip(("re", "im"), parts(table), strict=True):
        report.exact(f"{key}.{name}", part.half(), tensors[f"{key}.{name}"])


def run_audio(golden: Golden, report: Report) -> None:
    sizes, tensors, limits = golden.info["config"], golden.tensors, golden.info["tolerance"]["taps"]
    columns = tensors["in.block.features"].shape[-1]
    config = NetworkConfig(
        dim=sizes["out_dim"],
        num_heads=1,
        audio_dim=sizes["audio_dim"],
        num_encoder_layers=sizes["num_layers"],
        num_audio_token=sizes["num_token"],
        num_frames_per_block=columns // FRAMES_PER_LATENT,
        window_latents=columns // FRAMES_PER_LATENT,
    )
    encoder: CausalAudioEncoder = with_weights(CausalAudioEncoder(config), tensors, "weights.casual_audio_encoder.")
    with torch.no_grad():
        for case in golden.info["cases"]:
            features = tensors[f"in.{case['id']}.features"]
            if case["id"] == "block":
                audio = encoder.blocks(features[None], config.frames_per_block)
                local, overall = audio.local[0], audio.overall[0]
            else:
                local, overall = encoder(features)
            report.compare(f"local {case['id']}", local, tensors[f"out.{case['id']}.local"], **limits)
            report.compare(f"global {case['id']}", overall.unsqueeze(2), tensors[f"out.{case['id']}.global"], **limits)


def run_framepack(golden: Golden, report: Report) -> None:
    sizes, tensors, limits = golden.info["config"], golden.tensors, golden.info["tolerance"]["taps"]
    config = NetworkConfig(
        dim=sizes["inner_dim"],
        num_heads=sizes["num_heads"],
        in_dim=(channels := tensors["weights.frame_packer.proj.weight"].shape[1]),
        out_dim=channels,
    )
    packer = with_weights(FramePacker(config), tensors, "weights.frame_packer.")
    for case in golden.info["cases"]:
        name, rows, columns = case["id"], *grid_size(case["H"], case["W"])
        with torch.no_grad():
            tokens = packer(tensors[f"in.{name}.motion"][None])[0]
        positions = condition_positions(case["H"], case["W"])[rows * columns :]
        report.compare(f"tokens {name}", tokens, tensors[f"out.{name}.tokens"], **limits)
        report.exact(f"positions {name}", positions.int(), tensors[f"out.{name}.positions"])
        check_table(report, tensors, f"out.{name}.rope", rope_table(positions, config.head_dim))


def run_misc(golden: Golden, report: Report) -> None:
    sizes, tensors, limits = golden.info["config"], golden.tensors, golden.info["tolerance"]["taps"]
    pixels = tensors["out.head.unpatchified"]
    config = NetworkConfig(
        dim=sizes["dim"],
        num_heads=1,
        ffn_dim=8,
        eps=sizes["layer_norm_eps"],
        in_dim=len(pixels),
        out_dim=len(pixels),
    )
    layer, norm = Layer(config), AudioAdaLN(config.dim)
    with torch.no_grad():
        for scale in sorted({name.split(".rms")[0] for name in tensors if name.endswith(".rms.weight")}):
            x, out = tensors[f"{scale}.x"], scale.replace("in.", "out.", 1)
            rms = with_weights(layer.self_attn.norm_q, tensors, f"{scale}.rms.")
            norm3 = with_weights(layer.norm3, tensors, f"{scale}.norm3.")
            with_weights(norm.linear, tensors, f"{scale}.adain.linear.")
            report.compare(f"{scale} rms", rms(x), tensors[f"{out}.rms"], **limits)
            report.compare(f"{scale} layer norm", layer.norm(x), tensors[f"{out}.layernorm"], **limits)
            report.compare(f"{scale} norm3", norm3(x), tensors[f"{out}.norm3"], **limits)
            listening = norm(x, tensors[f"{scale}.adain.temb"].unsqueeze(1))
            report.compare(f"{scale} injection norm", listening, tensors[f"{out}.adain"], **limits)
        head = Head(config)
        head.head.weight.copy_(tensors["in.head.weight"])
        head.head.bias.copy_(tensors["in.head.bias"])
        frames, rows = pixels.shape[1], grid_size(*pixels.shape[2:])[0]
        x = rearrange(tensors["in.head.x"], "b (t s) d -> b t s d", t=frames)
        shared = rearrange(tensors["in.head.e"], "t d -> 1 1 t 1 d")
        shift, scale = rearrange(tensors["in.head.modulation"], "1 two d -> two 1 1 1 d") + shared
        out = head(x, torch.stack([shift, 1 + scale]))
        report.compare("head", out.flatten(1, 2), tensors["out.head.tokens"], **limits)
        report.compare("unpatch", unpatchify(out, rows)[0], pixels, **limits)
        for name in (name for name in tensors if name.startswith("out.sinusoid.")):
            values = timestep_embedding(tensors["in.timesteps"], int(name.removeprefix("out.sinusoid.")))
            report.compare(name, values, tensors[name], **limits)


def run_scheduler(golden: Golden, report: Report) -> None:
    tensors, limit = golden.tensors, {"float32": "tolerance_fp32", "bfloat16": "tolerance_bf16"}
    for name in tensors:
        if match := re.fullmatch(r"(shift([\d.]+)_n(\d+))/sigmas", name):
            schedule = flow_match_schedule(int(match[3]), float(match[2]))
            report.exact(name, torch.tensor(schedule), tensors[name])
            report.exact(f"{match[1]} timesteps", timesteps(schedule), tensors[f"{match[1]}/timesteps"])
    steps = sorted({int(match[1]) for name in tensors if (match := re.match(r"step/fp32/(\d+)/", name))})
    schedule = flow_match_schedule(len(steps), shift=3.0)
    for name in (name for name in tensors if name.endswith("/out")):
        step = name.removesuffix("out")
        level = int(step.split("/")[2])
        moved = euler_step(tensors[f"{step}x"], tensors[f"{step}v"], *schedule[level : level + 2])
        worst = golden.info[limit[str(moved.dtype).removeprefix("torch.")]]
        report.compare(name, moved, tensors[name], max_abs=worst)


RUNNERS: dict[str, Callable[[Golden, Report], None]] = {
    **dict.fromkeys(("dit_main", "dit_rollover", "dit_far", "dit_chain", "dit_multichar"), run_calls),
    "dit_unit_rope": run_rope,
    "dit_unit_audio": run_audio,
    "dit_unit_framepack": run_framepack,
    "dit_unit_misc": run_misc,
    "scheduler": run_scheduler,
}
