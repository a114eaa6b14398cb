"""Goldens of the rollout: our levels, caches, conditions, sampler and decoder around the recorded stand-in network.

The stand-in returns tanh of its input plus means of all its arguments, so that sink, history, levels, audio
and their order all leave marks in the latents. It keeps its means as values in our own cache.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from avatar.denoiser.attention import condition_positions, grid_size
from avatar.denoiser.cache import History, KeysValues
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.model import Network
from avatar.denoiser.sampler import clip_noise, flow_match_schedule
from avatar.types import FRAMES_PER_LATENT, Block, Conditions, Session
from avatar.vae import whole_clip
from avatar.vae.vae import Vae
from avatar.vae.wan import Slots
from tests.parity.goldens import Golden, Report
from tests.parity.vae import frames_of, wan_vae

# Fields of each kind of event that are recorded exactly, and as means.
PREFILL = (["ref_shape", "motion_shape"], ["ref_mean", "motion_mean"])
DENOISE = (
    ["t", "current_start", "current_end", "cache_pos", "cache_active"],
    ["audio_mean", "ref_mean", "motion_mean", "hist_mean", "cond_mean", "ctx_mean", "x_in_mean"],
)


def run_tpp(golden: Golden, report: Report) -> None:
    """Picture to frames with separate levels, the sink replaced once by block 0's result."""
    info, tensors, vae, limit = golden.info, golden.tensors, rollout_vae(golden), golden.info["tolerance_latents"]
    motion = vae.encode_picture(tensors["image/rgb_u8"])
    check_motion(report, golden, motion, motion)

    config, session = rollout_config(golden), Session("golden", info["seed"], motion)
    levels = [Level(golden, config, level, session) for level in range(config.num_levels)]
    blocks = generate(report, golden, levels, Conditions(0, motion[:, :1], tensors["context"]))
    state = vae.open(session)
    check_video(report, golden, [frames_of(vae, block, state) for block in blocks])
    for level, each in enumerate(levels):
        check_events(report, each, [event for event in info["events"] if event["rank"] == level], limit)


def run_offline(golden: Golden, report: Report) -> None:
    """Picture to frames as on one GPU: the picture stays the sink, and clips are decoded one by one.

    A clip's frames are compared, which the latents of the frames before it, encoded anew, have left their mark on.
    """
    info, tensors, vae, limit = golden.info, golden.tensors, rollout_vae(golden), golden.info["tolerance_latents"]
    rgb = tensors["image/rgb_u8"]
    motion, sink = whole_clip.encode_picture(vae, rgb)
    check_motion(report, golden, vae.encode_picture(rgb), motion)

    config = replace(rollout_config(golden), sink_update_block=None)
    session = Session("golden", info["seed"], motion)
    levels = [Level(golden, config, level, session) for level in range(config.num_levels)]
    latents = [block.latent for block in generate(report, golden, levels, Conditions(0, sink, tensors["context"]))]
    whole = torch.cat([latent for latent in latents if latent is not None], dim=1)
    clips = torch.split(whole, config.num_frames_per_block * info["blocks_per_clip"], dim=1)
    check_video(report, golden, list(whole_clip.decode_clips(vae, rgb, clips)))
    for level, each in enumerate(levels):
        events = [event for event in info["events"] if event["cache_id"] == level]
        # Of its 92 motion latents, too, the last 19 alone are looked at.
        seen = [{**event, "motion_shape": [1, *motion.shape]} for event in events]
        check_events(report, each, seen, limit)


def rollout_vae(golden: Golden) -> Vae[Slots]:
    weights = golden.sibling(golden.info["vae_weights"].removesuffix(".safetensors"))
    return wan_vae(weights.info["config"], weights.tensors)


def check_motion(report: Report, golden: Golden, first: Tensor, last: Tensor) -> None:
    """Compare motion latents at the start and at the end of the still clip."""
    limit, warmup = golden.info["tolerance_latents"], golden.tensors["motion/initial_first7"]
    report.compare("warm-up", first[:, : warmup.shape[1]], warmup, max_abs=limit)
    report.compare("motion", last, golden.tensors["motion/initial_last19"], max_abs=limit)


def generate(report: Report, golden: Golden, levels: list["Level"], conditions: Conditions) -> list[Block]:
    """Run all blocks through all levels, and compare their latents and sinks."""
    tensors, limit, features = golden.tensors, golden.info["tolerance_latents"], audio_blocks(golden)
    last, session, sinks, blocks = levels[-1].denoiser, levels[-1].state.session, [conditions], []
    noise_source = clip_noise(golden.info["blocks_per_clip"])
    for index, name in enumerate(block_names(golden)):
        update = last.sink_update_block(session)
        block = Block(index, features[index], conditions=sinks[0 if update is None or index < update else -1])
        noise = noise_source(session, index, golden.info["frames_per_block"])
        report.compare(f"{name}/noise", noise, tensors[f"{name}/noise"], max_abs=limit)
        for level, each in enumerate(levels):
            block = each.denoiser.step(block, each.state)
            assert block.latent is not None
            report.compare(f"{name}/s{level}", block.latent, tensors[f"{name}/s{level}/x_out"], max_abs=limit)
        if block.latent is not None and index == 0 and last.updates_sink(session):
            sinks.append(conditions.with_sink(block.latent))
        blocks.append(block)
    for version, made in enumerate(sinks):
        report.compare(f"sink {version}", made.sink, tensors[f"ref_latents/prefill{version}"][0], max_abs=limit)
    return blocks


def block_names(golden: Golden) -> list[str]:
    """Return the recording's names of its blocks, in order."""
    clips, blocks = golden.info["clips"], golden.info["blocks_per_clip"]
    return [f"r{clip}/b{block}" for clip in range(clips) for block in range(blocks)]


def audio_blocks(golden: Golden) -> tuple[Tensor, ...]:
    columns = FRAMES_PER_LATENT * golden.info["frames_per_block"]
    return torch.split(golden.tensors["audio/model_input"][0], columns, dim=-1)


class Level:
    """A denoiser around its own stand-in network."""

    def __init__(self, golden: Golden, config: NetworkConfig, level: int, session: Session) -> None:
        names = block_names(golden)

        def noise(_: Session, index: int, __: int) -> Tensor:
            return golden.tensors[f"{names[index]}/noise"]

        self.standin = StandIn(golden.info["coef"])
        self.denoiser = Denoiser(cast(Network, self.standin), config, level, noise)
        self.state = self.denoiser.open(session)


def rollout_config(golden: Golden) -> NetworkConfig:
    """Return the stand-in's sizes and the recorded rollout's constants."""
    info, tensors = golden.info, golden.tensors
    _, layers, width, _ = tensors["audio/model_input"].shape
    rows, columns = tensors["context"].shape
    return NetworkConfig(
        dim=8,
        num_heads=1,
        num_layers=1,
        audio_inject_layers=(),
        text_len=rows,
        text_dim=columns,
        audio_dim=width,
        num_encoder_layers=layers,
        num_frames_per_block=info["frames_per_block"],
        window_latents=info["kv_tokens"] // info["tokens_per_frame"],
        schedule=flow_match_schedule(len(info["timesteps"]), shift=3.0),
        sink_update_block=info["blocks_per_clip"],
    )


class StandIn:
    """The recorded stand-in network with our network's interface; `events` lists its calls in the recording's form."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, coef: dict[str, float]) -> None:
        self.coef = coef
        self.events: list[dict[str, Any]] = []

    def embed_time(self, timesteps: Tensor) -> float:
        return timesteps.item()

    def embed_text(self, text: Tensor) -> float:
        return mean(text)

    def encode_audio(self, features: Tensor, *_: Tensor | None) -> float:
        return mean(features)

    def read_texture(self, _: Tensor) -> None:
        """This network has no mover."""

    def move(self, reference: Tensor, *_: object, **__: object) -> Tensor:
        return reference

    def prefill(self, reference: Tensor, motion: Tensor, _: float) -> list[KeysValues]:
        height, width = reference.shape[-2:]
        rows, columns = grid_size(height, width)
        values = torch.full((1, len(condition_positions(height, width)), 1, 8), mean(motion))
        values[:, : rows * columns] = mean(reference)
        self.events.append(
            {
                "kind": "prefill",
                "ref_mean": mean(reference),
                "motion_mean": mean(motion),
                "ref_shape": [*reference.shape],
                "motion_shape": [*motion.shape],
            }
        )
        return [(torch.zeros_like(values), values)]

    def __call__(
        self,
        x: Tensor,
        t: float,
        text: float,
        audio: float,
        pose: Tensor,
        first_frame: int,
        history: History,
        *_: None,
    ) -> Tensor:
        rows, columns = grid_size(*x.shape[-2:])
        reference = rows * columns
        sink, tokens = len(condition_positions(*x.shape[-2:])), reference * x.shape[2]
        own = torch.full((1, tokens, 1, 8), mean(x))
        values = history.extend(0, torch.zeros_like(own), own)[1]
        window = values[:, sink:]
        event: dict[str, Any] = {
            "kind": "denoise",
            "t": t,
            "current_start": first_frame * reference,
            "current_end": first_frame * reference + tokens,
            "cache_pos": int((window == own[0, 0]).flatten(2).all(-1)[0].nonzero()[0]),
            "cache_active": window.shape[1],
            "audio_mean": audio,
            "ref_mean": mean(values[:, :reference]),
            "motion_mean": mean(values[:, reference:sink]),
            "hist_mean": mean(window),
            "cond_mean": mean(pose),
            "ctx_mean": text,
            "x_in_mean": mean(x),
        }
        self.events.append(event)
        means = ("audio_mean", "ref_mean", "motion_mean", "hist_mean", "cond_mean", "ctx_mean")
        bias = sum((self.coef[name] * event[key] for name, key in zip("cdefgh", means, strict=True)), 0.0)
        return torch.tanh(self.coef["a"] * x + (self.coef["b"] * t / 1000 + bias))


def mean(x: Tensor) -> float:
    return x.double().mean().item()


def check_events(report: Report, level: Level, recorded: list[dict[str, Any]], limit: float) -> None:
    """Compare order and integers exactly, means within the limit."""
    events, rank = level.standin.events, f"level {level.denoiser.level}"
    recorded = sorted(recorded, key=lambda event: event["seq"])
    report.exact(f"{rank} order", [each["kind"] for each in events], [each["kind"] for each in recorded])
    for event, expected in zip(events, recorded, strict=False):
        name = f"{rank} event {expected['seq']}"
        exact, means = PREFILL if expected["kind"] == "prefill" else DENOISE
        if expected["kind"] == "denoise":
            report.exact(f"{name} sigma", level.denoiser.sigma, expected["sigma"])
            report.exact(f"{name} next sigma", level.denoiser.sigma_next, expected["sigma_next"])
        for key in exact:
            report.exact(f"{name} {key}", event[key], expected[key])
        actual, wanted = (torch.tensor([each[key] for key in means]) for each in (event, expected))
        report.compare(f"{name} means", actual, wanted, max_abs=limit)


def check_video(report: Report, golden: Golden, frames: list[Tensor]) -> None:
    limit, tensors, video = golden.info["tolerance_frames"], golden.tensors, torch.cat(frames, dim=1)
    report.exact("video", [*video.shape], golden.info["video_shape"])
    report.compare("frames", video[:, :, ::4, ::4], tensors["frames/stride4"], max_abs=limit)
    report.compare("frame means", video.mean((0, 2, 3)), tensors["frames/per_frame_mean"], max_abs=limit)
    report.compare("frame spreads", video.std((0, 2, 3)), tensors["frames/per_frame_std"], max_abs=limit)


RUNNERS: dict[str, Callable[[Golden, Report], None]] = {"rollout_tpp": run_tpp, "rollout_single_offline": run_offline}
