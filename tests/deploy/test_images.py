"""The Dockerfile pins every package, and the gateway's image has no tensor library. tests.containers builds it."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STAGES = {name: text for text in DOCKERFILE.split("\nFROM ")[1:] for name in re.findall(r"\A\S+ AS (\S+)", text)}
IMAGES = ("gateway", "voice", "worker-cpu", "worker-cuda")
EXTRAS = {"gateway": ("gateway",), "voice": ("voice",), "worker-cpu": ("worker",), "worker-cuda": ("worker",)}


def closure(*extras: str) -> set[str]:
    """Return all packages that pip installs for extras of the suite."""
    found: set[tuple[str, str]] = set()
    waiting = [("avatar-suite", extra) for extra in ("", *extras)]
    while waiting:
        if (each := waiting.pop()) in found:
            continue
        found.add(each)
        name, extra = each
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(needed.name), one) for one in ("", *needed.extras)]
    return {name for name, _ in found} - {"avatar-suite"}


def pinned() -> set[str]:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    return {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}


def test_the_gateways_image_has_no_tensor_library() -> None:
    names = closure("gateway")
    assert {"grpcio", "redis", "opentelemetry-exporter-prometheus"} <= names
    assert names & {"torch", "numpy", "transformers", "diffusers", "av", "pillow", "triton"} == set()
    assert "torch" in closure("worker")


def test_the_voices_image_has_neither_torch_nor_piper() -> None:
    names = closure("voice")
    assert {"aiohttp", "numpy", "soxr"} <= names
    assert names & {"torch", "transformers", "piper-tts", "onnxruntime"} == set()
    assert "piper" not in DOCKERFILE


@pytest.mark.parametrize("image", ["gateway", "voice", "worker-cpu"])
def test_every_package_of_an_image_is_pinned(image: str) -> None:
    assert closure(*EXTRAS[image]) - pinned() == set()


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_built_with_the_lock_and_its_extras(image: str) -> None:
    assert f"'.[{','.join(EXTRAS[image])}]'" in STAGES[f"build-{image}"]
    assert "--constraint requirements.lock" in STAGES[f"build-{image}"]
    assert f"COPY --from=build-{image} " in STAGES[image]
    assert "USER 10001:10001" in STAGES["runtime"]
    assert STAGES[image].startswith("runtime AS")


@pytest.mark.parametrize("image", ["runtime", "gateway", "voice", "worker-cpu"])
def test_no_command_writes_to_an_images_own_layers(image: str) -> None:
    assert "\nRUN " not in STAGES[image], "what a build mounts, such as a machine's pip.conf, would leave empty files"


def test_images_have_the_launchers_allocator_settings() -> None:
    from services.local.processes import ENVIRONMENT

    assert [f"{name}={value}" for name, value in ENVIRONMENT.items() if f"{name}={value}" not in DOCKERFILE] == []


def test_every_base_is_pinned_to_a_release() -> None:
    bases = {base for base in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) if base not in STAGES}
    release = r"[a-z/]+:\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?"
    assert [base for base in bases if not re.fullmatch(release, base)] == []
