"""Tests of avatar.checkpoints.sizing: its counts are those of the network, and those that were audited."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from avatar.checkpoints import sizing
from avatar.checkpoints.inspect import main, sizing_of
from avatar.checkpoints.sizing import (
    H100,
    H200,
    TINY,
    WAN,
    DecoderCost,
    Gpu,
    Placement,
    Sizing,
    audio_work,
    placements,
    prefill_work,
    step_work,
)
from avatar.denoiser.config import base
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.model import Network
from avatar.runtime.admission import LIVE_SHARE
from avatar.types import Block, Conditions, Session
from avatar.vae.picture.rule import PictureRule
from avatar.vae.tiny_decoder import TinyDecoder, TinyDecoderCodec, TinyDecoderConfig
from avatar.vae.vae import Vae, VaeConfig
from avatar.vae.wan import WanCodec, WanConfig
from services.local.processes import ROOT
from tests.denoiser.test_step_costs import STEP
from tests.deploy.test_compose import DEVICES, given, of
from tests.published import ADAPTER, small
from tests.vae.test_traffic import EXPECTED as DECODER

SIZE = (48, 88)  # latents of 704x384
# Traffic of the network and of Wan's decoder when the counts were audited (8d92bea), before both were lightened.
# Of the decoder's 244 GB, convolutions are 21.
AUDITED_PASSES, AUDITED_DECODER = 140, replace(WAN, traffic=223e9 / (3 * 48 * 88))


def tera(flops: float) -> float:
    return flops / 1e12


@pytest.mark.parametrize(
    ("width", "height", "flops"), [(704, 384, 120.9), (512, 384, 80.0), (512, 320, 63.7), (384, 256, 34.7)]
)
def test_a_step_of_the_public_network_has_its_audited_operations(width: int, height: int, flops: float) -> None:
    assert tera(step_work(base(), height // 8, width // 8).flops) == pytest.approx(flops, abs=0.1)


@pytest.mark.parametrize(("width", "height"), sizing.SIZES)
def test_an_upright_video_costs_what_it_costs_lying(width: int, height: int) -> None:
    lying, upright = public(width, height), public(height, width)
    assert step_work(base(), height // 8, width // 8) == step_work(base(), width // 8, height // 8)
    for each in ((0, 1, 2, 3), (0,), ()):
        placement = Placement(each, has_decoder=True)
        assert lying.session_bytes(placement) == upright.session_bytes(placement)


def test_the_sizes_of_profiles_are_in_the_guides_table() -> None:
    served = {
        tuple(map(int, size.split("x")))
        for profile in DEVICES
        for service in of(profile).values()
        for size in given(service).get("AVATAR_SIZES", "").split(",")
        if size
    }
    assert {max(size, size[::-1]) for size in served} <= {*sizing.SIZES}


def test_the_benchmark_expects_a_levels_memory_by_its_cache() -> None:
    """That of the sizing guide: a state of a level has no text, which its session's levels share."""
    with torch.device("meta"):
        network = Network(base()).bfloat16()
    state_bytes, _ = Denoiser(network, network.config, 1).memory(*SIZE)
    text = f"{state_bytes / 1e9:.2f}"
    (row,) = re.findall(r"^\| `memory` .*$", (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert f" {text} GB each" in row
    assert f"| **a session and level** | **{text}**" in (ROOT / "docs/operations/sizing.md").read_text(encoding="utf-8")


def test_matrix_products_attention_and_prefill_have_their_audited_shares() -> None:
    work = step_work(base(), *SIZE)
    assert tera(work.gemm) == pytest.approx(79.8, abs=0.1)
    assert tera(work.attention) == pytest.approx(41.1, abs=0.1)
    assert tera(prefill_work(base(), *SIZE).flops) == pytest.approx(72.1, abs=0.1)
    assert tera(WAN.work(base(), *SIZE).flops) == pytest.approx(27.4, abs=0.05)


def test_traffic_is_that_of_the_committed_counts() -> None:
    network_gb = STEP["traffic beside GEMM and attention, GB"]
    assert step_work(base(), *SIZE).traffic / 1e9 == pytest.approx(network_gb, rel=0.01)
    decoder_gb = sum(gb for name, (_, gb) in DECODER.items() if name != "convolution")
    assert WAN.work(base(), *SIZE).traffic / 1e9 == pytest.approx(decoder_gb, rel=0.02)


def test_operations_are_those_that_torch_counts() -> None:
    config = replace(small(), dim=256, ffn_dim=512, num_heads=4, num_layers=4, audio_inject_layers=(0, 2))
    height, width = 16, 24
    with torch.device("meta"):
        network = Network(config).bfloat16()
    latent = torch.zeros(config.in_dim, config.num_frames_per_block, height, width)
    features = torch.zeros(config.num_encoder_layers, config.audio_dim, config.frames_per_block)
    denoiser = Denoiser(network, config, 1)
    state = denoiser.open(Session("session", 0, latent[:, :1]))
    conditions = Conditions(0, latent[:, :1], torch.zeros(0, config.text_dim))
    for index in range(config.window_blocks + 1):
        with FlopCounterMode(display=False) as counted:
            denoiser.step(Block(index, features, latent, conditions), state)
    work = step_work(config, height, width)
    found = counted.get_flop_counts()["Global"]
    attention = sum(flops for operator, flops in found.items() if "bmm" in str(operator) or "scaled" in str(operator))
    assert attention == pytest.approx(work.attention, rel=0.02)
    assert counted.get_total_flops() - attention == pytest.approx(work.gemm, rel=0.05), "audio tokens are not counted"


@pytest.mark.parametrize(
    ("gpu", "compiled", "float8", "step_ms"),
    [
        *((H100, compiled, float8, ms) for compiled, float8, ms in ((False, False, 262), (True, False, 220))),
        *((H200, compiled, float8, ms) for compiled, float8, ms in ((False, False, 243), (True, False, 213))),
        (H100, True, True, 170),
        (H200, True, True, 163),
    ],
)
def test_a_steps_time_is_the_audited_estimate(
    gpu: Gpu, compiled: bool, float8: bool, step_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "EAGER_PASSES", AUDITED_PASSES)
    level = Sizing(base(), *SIZE, 0, 0, 0).busy_s(Placement((0,)), gpu, compiled=compiled, float8=float8)
    assert 1000 * level == pytest.approx(step_ms, abs=3)


@pytest.mark.parametrize(
    ("num_devices", "rates"), [(1, (10.5, 12, 15)), (2, (18, 21, 25)), (4, (29, 33, 38)), (5, (49, 56, 70))]
)
def test_frame_rates_are_the_audited_estimates(
    num_devices: int, rates: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "EAGER_PASSES", AUDITED_PASSES)
    of_704 = Sizing(base(), *SIZE, 0, 0, 0, AUDITED_DECODER)  # the audit left audio out
    found = [of_704.frame_rate_hz(placements(num_devices, 4), H200, **speed) for speed in sizing.SPEEDS.values()]
    assert found == pytest.approx(rates, rel=0.06)


@pytest.mark.parametrize("cost", [WAN, TINY])
def test_a_decoders_state_is_the_one_that_its_worker_reserves(cost: DecoderCost) -> None:
    codec: Any = WanCodec(WanConfig(), "meta", torch.bfloat16)
    if cost == TINY:
        with torch.device("meta"):
            codec = TinyDecoderCodec(codec, TinyDecoder().bfloat16(), TinyDecoderConfig("normalised"))
    rule = PictureRule("reference", width=704, height=384)
    vae: Vae[Any] = Vae(codec, VaeConfig("wan", rule, 25, {}))
    assert cost.state_bytes(1, 1) == vae.pixel_bytes()


def test_a_tiny_decoder_frees_a_single_device() -> None:
    of_704 = Sizing(base(), *SIZE, 0, 0, 0, TINY)
    rate_hz = of_704.frame_rate_hz(placements(1, 4), H200, compiled=True, float8=True)
    assert rate_hz == pytest.approx(17.5, rel=0.06)


def test_levels_and_decoder_are_shared_out_over_devices() -> None:
    assert placements(1, 4) == [Placement((0, 1, 2, 3), has_decoder=True)]
    assert placements(2, 4) == [Placement((0, 1)), Placement((2, 3), has_decoder=True)]
    assert placements(4, 4) == [*(Placement((level,)) for level in range(3)), Placement((3,), has_decoder=True)]
    assert placements(5, 4) == [*(Placement((level,)) for level in range(4)), Placement((), has_decoder=True)]
    assert [len(each.levels) for each in placements(3, 4)] == [2, 1, 1]
    for num_devices in (0, 6):
        with pytest.raises(ValueError, match=f"1 to 5 devices, got {num_devices}; more devices are more pipelines"):
            placements(num_devices, 4)


def public(width: int, height: int) -> Sizing:
    with torch.device("meta"):
        network = Network(base()).bfloat16()
    return sizing_of(network, height // 8, width // 8, WAN, audio_work(24, 1024), 1.5e9)


@pytest.mark.parametrize(
    ("num_devices", "size", "memory_gb", "sessions"),
    [(1, (384, 256), 80, 1), (1, (704, 384), 80, 0), (1, (704, 384), 141, 1), (2, (704, 384), 80, 1)],
)
def test_sessions_fit_with_a_tenth_to_spare(
    num_devices: int, size: tuple[int, int], memory_gb: float, sessions: int
) -> None:
    placed, of_size = placements(num_devices, 4), public(*size)
    assert of_size.sessions_that_fit(placed, memory_gb * 1e9) == sessions
    used = max(of_size.fixed_bytes(each) + sessions * of_size.session_bytes(each) for each in placed)
    more = max(of_size.fixed_bytes(each) + (sessions + 1) * of_size.session_bytes(each) for each in placed)
    assert used <= 0.9e9 * memory_gb or not sessions
    assert more > 0.9e9 * memory_gb


@pytest.mark.parametrize(("rate_hz", "sessions"), [(24.9, 0), (25.1, 1), (53.0, 1), (53.5, 2)])
def test_live_sessions_get_the_share_of_admission_and_a_single_one_all_time(
    rate_hz: float, sessions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sizing.LIVE_SHARE == LIVE_SHARE
    monkeypatch.setattr(Sizing, "frame_rate_hz", lambda *_, **__: rate_hz)
    assert Sizing(base(), *SIZE, 0, 0, 0).live_sessions(placements(5, 4), H100) == sessions


def test_inspect_says_what_fits_on_devices(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(published), "--adapter", str(published / ADAPTER), "--devices", "2", "--memory", "80"])
    lines = capsys.readouterr().out.splitlines()
    assert "a pipeline on 2 x 80 GB, a tenth of which stays free" in lines
    assert "device 1  levels 2, 3, decoder, audio encoder" in lines
    assert any("an estimate from counts for an H100; it has not run on a GPU" in line for line in lines)
    (row,) = (line.split() for line in lines if line.startswith("704x384 "))
    assert len(row) == 9
    assert float(row[6]) < float(row[7])
    for column in ("a session, GB", "sessions fit", "in time", "eager", "compiled", "float8"):
        assert column in "\n".join(lines[-5:]), "explained below the table"
    with pytest.raises(SystemExit, match="1 to 5 devices, got 9"):
        main(["inspect", str(published), "--devices", "9"])


@pytest.mark.parametrize("memory", ["nan", "0", "-5", "inf"])
def test_a_devices_memory_is_a_positive_number(checkpoint: Path, memory: str) -> None:
    with pytest.raises(SystemExit, match="positive number of GB"):
        main(["inspect", str(checkpoint), "--devices", "1", f"--memory={memory}"])


@pytest.mark.parametrize("profile", DEVICES)
def test_the_sizes_of_a_profile_keep_time_and_fit_in_80_gb(profile: str) -> None:
    placed = placements(DEVICES[profile], 4)
    (served,) = {given(service)["AVATAR_SIZES"] for service in of(profile).values() if "AVATAR_SIZES" in given(service)}
    for size in served.split(","):
        width, height = map(int, size.split("x"))
        of_size = public(width, height)
        assert LIVE_SHARE * of_size.frame_rate_hz(placed, H100) >= 25, "with the time that admission gives away"
        assert of_size.sessions_that_fit(placed, 80e9) >= 1
