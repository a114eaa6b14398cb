"""Tests of services.worker and services.denoiser.loading: settings of device, precision and speed."""

import asyncio
import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from avatar import telemetry
from avatar.audio.model import AudioModel
from avatar.checkpoints.files import save
from avatar.denoiser.denoiser import Denoiser
from avatar.rpc.health import problem
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import AudioSettings, DenoiserSettings, VaeSettings
from avatar.store.sessions import SessionStore
from services.audio.__main__ import build as build_audio
from services.audio.service import AudioServicer
from services.denoiser.__main__ import build as build_denoiser
from services.denoiser.loading import latent_sizes
from services.denoiser.service import DenoiserServicer
from services.local.processes import free_ports
from services.vae.__main__ import build as build_vae
from services.worker import num_cores, open_device_queue, worker_process


def built(checkpoint: Path, store: SessionStore, **settings: Any) -> DenoiserServicer:
    with DeviceQueue() as queue:
        return build_denoiser(DenoiserSettings(checkpoint=checkpoint, **settings), store, queue)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "cuda:99"}, r"AVATAR_DEVICE is 'cuda:99', this machine has \d+ CUDA devices"),
        ({"attention": "fast"}, "AVATAR_ATTENTION: .*'fast', expected one of auto, math, flash"),
        ({"attention": "cudnn"}, "AVATAR_ATTENTION: .*'cudnn', which cpu does not run in torch.float32"),
        ({"float8": True}, "AVATAR_FLOAT8: float8 is slower than bfloat16 unless .* set AVATAR_COMPILE=true too"),
        (
            {"float8": True, "compile": True},
            "AVATAR_FLOAT8: float8 needs a CUDA device of compute capability 8.9 or newer, got cpu",
        ),
        ({"sizes": ("60x64",)}, "AVATAR_SIZES names 60x64, expected multiples of 8"),
        ({"sizes": ("72x64",)}, "AVATAR_SIZES: latents must have even sides"),
    ],
)
async def test_a_setting_that_a_denoiser_does_not_support_stops_its_start(
    settings: dict[str, Any], words: str, checkpoint: Path, store: SessionStore
) -> None:
    with pytest.raises(ValueError, match=words):
        built(checkpoint, store, **settings)


async def test_the_attention_kernel_is_logged_for_each_size(
    checkpoint: Path, store: SessionStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "services.denoiser.loading")
    built(checkpoint, store, sizes=("64x64",), attention="math")
    said = [vars(record) for record in caplog.records if record.message == "attention kernel"]
    assert [(each["kernel"], each["latents"]) for each in said] == [("math", "8x8")]


async def test_compiling_needs_sizes_if_the_checkpoint_fixes_none(
    checkpoint: Path, store: SessionStore, tmp_path: Path
) -> None:
    (tmp_path / "denoiser").symlink_to(checkpoint / "denoiser")
    with pytest.raises(ValueError, match="AVATAR_COMPILE needs AVATAR_SIZES"):
        built(tmp_path, store, compile=True)


def test_a_vae_of_scale_2_has_half_as_many_latents_in_a_row(tmp_path: Path) -> None:
    rule, network = {"fit": "face", "width": 256, "height": 192}, {"wide": 8, "mid": 8, "thin": 8, "latent_scale": 1.0}
    for scale, sizes in ((None, [(24, 32)]), (2, [(12, 16)])):
        config = {"codec": "light", "picture": rule, "frame_rate_hz": 25, "network": network}
        network = {**network, "scale": 2}
        save(tmp_path / "vae", config, torch.nn.Linear(1, 1), torch.float16)
        assert latent_sizes(DenoiserSettings(checkpoint=tmp_path)) == sizes, scale
    with pytest.raises(ValueError, match="AVATAR_SIZES names 72x64, expected multiples of 16"):
        latent_sizes(DenoiserSettings(checkpoint=tmp_path, sizes=("72x64",)))


async def test_a_denoiser_without_a_known_size_says_that_it_is_not_warm(
    checkpoint: Path, store: SessionStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "denoiser").symlink_to(checkpoint / "denoiser")
    assert built(tmp_path, store).info().step_s == 0
    assert "not warm: the first stream will be late" in caplog.text
    caplog.clear()
    assert built(tmp_path, store, sizes=("64x64",)).info().step_s > 0
    assert "not warm" not in caplog.text


async def test_a_compiled_denoiser_is_warmed_up_at_every_level_for_the_checkpoints_size(
    checkpoint: Path, store: SessionStore
) -> None:
    with (
        patch("avatar.denoiser.speed.compile_layers") as compile_layers,
        patch.object(Denoiser, "warm", autospec=True, return_value=1) as warm,
    ):
        built(checkpoint, store, compile=True)
    assert compile_layers.call_count == 1
    # Once to warm up and once to be measured.
    assert [(call.args[0].level, *call.args[1:]) for call in warm.call_args_list[::2]] == [
        (level, 8, 8) for level in range(3)
    ]


async def test_every_worker_refuses_a_device_that_the_machine_lacks(checkpoint: Path) -> None:
    with DeviceQueue() as queue:
        with pytest.raises(ValueError, match="AVATAR_DEVICE is 'cuda:99'"):
            build_audio(AudioSettings(checkpoint=checkpoint, device="cuda:99"), queue)
        with pytest.raises(ValueError, match="AVATAR_DEVICE is 'cuda:99'"):
            build_vae(VaeSettings(checkpoint=checkpoint, device="cuda:99"), queue)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_denoisers_weights_have_its_dtype(dtype: str, checkpoint: Path, store: SessionStore) -> None:
    with patch("services.denoiser.loading.Denoiser", wraps=Denoiser) as made:
        built(checkpoint, store, dtype=dtype)
    weights = made.call_args.args[0].parameters()
    assert {weight.dtype for weight in weights} == {getattr(torch, dtype)}


async def test_audio_is_encoded_in_float32_whatever_the_dtype(checkpoint: Path) -> None:
    torch.backends.cudnn.allow_tf32 = True
    with DeviceQueue() as queue, patch("services.audio.__main__.AudioServicer", wraps=AudioServicer) as made:
        build_audio(AudioSettings(checkpoint=checkpoint, dtype="bfloat16"), queue)
    assert {weight.dtype for weight in made.call_args.args[0].encoder.parameters()} == {torch.float32}
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(("step_s", "status"), [(0.47, ""), (0.49, "NOT_SERVING")])
async def test_a_worker_that_is_slower_than_its_blocks_is_not_healthy_for_live(
    step_s: float,
    status: str,
    checkpoint: Path,
    redis: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(telemetry, "set_up", lambda *_: None)  # it is set up once per process
    settings = AudioSettings(checkpoint=checkpoint, redis_url=redis, listen=f"127.0.0.1:{free_ports(1)[0]}")
    ticks = itertools.count(0, round(step_s * 1e9))
    async with worker_process("audio", settings) as worker:
        with (
            patch.object(AudioModel, "warm", return_value=1),
            patch("avatar.runtime.admission.time.perf_counter_ns", lambda: next(ticks)),
        ):
            servicer = build_audio(settings, worker.queue)
        async with worker.serving(servicer):
            found = [await asyncio.to_thread(problem, settings.listen, name) for name in ("", "live")]
    assert found == ["", f"{settings.listen}: {status}" if status else ""]
    slow = [record for record in caplog.records if record.message == "a step takes longer than its block lasts"]
    assert [vars(record)["step_s"] for record in slow] == ([step_s] if status else [])


@pytest.mark.parametrize(
    ("dtype", "instructions", "is_logged"),
    [
        ("bfloat16", {"avx2": True}, True),
        ("bfloat16", {"avx2": True, "avx512_bw": True}, False),
        ("bfloat16", {"neon": True, "bf16": True}, False),
        ("float32", {"avx2": True}, False),
    ],
)
async def test_a_dtype_without_instructions_of_the_processor_is_logged(
    dtype: str,
    instructions: dict[str, bool],
    checkpoint: Path,
    caplog: pytest.LogCaptureFixture,
    *,
    is_logged: bool,
) -> None:
    with DeviceQueue() as queue, patch("torch.cpu.get_capabilities", return_value=instructions):
        build_vae(VaeSettings(checkpoint=checkpoint, dtype=dtype), queue)
    hints = [getattr(record, "hint", "") for record in caplog.records]
    assert any("AVATAR_DTYPE=float32" in hint for hint in hints) == is_logged


def test_workers_of_a_process_report_one_queue_and_those_of_a_machine_one_device(checkpoint: Path) -> None:
    settings = AudioSettings(checkpoint=checkpoint, threads=3)
    with open_device_queue(settings) as queue, open_device_queue(settings) as other:
        audio, vae = build_audio(settings, queue).info(), build_vae(VaeSettings(checkpoint=checkpoint), queue).info()
        elsewhere = build_audio(settings, other).info()
    assert audio.load.queue == vae.load.queue != elsewhere.load.queue
    assert audio.load.device == vae.load.device == elsewhere.load.device
    assert (audio.load.num_cores, audio.load.num_threads) == (num_cores(), 3)
    assert elsewhere.load.session_share == pytest.approx(elsewhere.step_s / 0.48)
    assert elsewhere.load.live_share == 0


def test_a_gpus_streams_get_what_is_free_and_its_allocator_expands_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="a"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 40 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 38 << 30)
    with open_device_queue(AudioSettings(device="cuda")) as queue:
        assert queue.load.memory.free_bytes == pytest.approx(9 << 30), "nine tenths of 8 free and 2 cached"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    with open_device_queue(AudioSettings(device="cuda", memory_gb=5)) as queue:
        assert queue.load.memory.free_bytes == 5e9
