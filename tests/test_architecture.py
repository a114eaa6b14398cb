"""Tests of the code base: the direction of imports, the modules that processes load, and generated code.

services, training, benchmarks -> avatar.rpc -> avatar.runtime.pipeline
                               -> avatar.audio | denoiser | text | vae -> avatar.types
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

_WORKER = (
    *(
        "avatar.aio",
        "avatar.checkpoints",
        "avatar.errors",
        "avatar.rpc",
        "avatar.runtime",
        "avatar.settings",
        "avatar.store",
    ),
    *("avatar.telemetry", "avatar.types", "avatar.worker", "services.process", "services.worker"),
)

# The modules of avatar.checkpoints that models are loaded with.
_FILES = ("avatar.checkpoints.fields", "avatar.checkpoints.files", "avatar.checkpoints.part")

# Our modules that each part may import. A name stands for the module and all modules below it. A part may always import
# its own modules. Imports under `if TYPE_CHECKING` count too.
ALLOWED: dict[str, tuple[str, ...]] = {
    # Leaves. No tensors.
    "avatar.aio": (),
    "avatar.errors": (),
    "avatar.settings": (),
    "avatar.telemetry": (),
    "avatar.store": ("avatar.errors", "avatar.worker"),  # a client can act on a store's errors
    # Tensor code. The four never see each other, but for a network that moves pictures of its codec.
    "avatar.types": (),
    "avatar.checkpoints": ("avatar.types",),
    "avatar.audio": (*_FILES, "avatar.types"),
    "avatar.denoiser": (*_FILES, "avatar.types", "avatar.vae.light", "avatar.vae.mover"),
    "avatar.text": _FILES,
    "avatar.vae": (*_FILES, "avatar.types"),
    # Streams.
    "avatar.runtime.admission": ("avatar.errors", "avatar.runtime.device_memory", "avatar.telemetry", "avatar.types"),
    "avatar.runtime": ("avatar.aio", "avatar.runtime.admission", "avatar.types"),
    "avatar.rpc.codec": ("avatar.rpc.wire", "avatar.runtime.admission", "avatar.types", "avatar.worker"),
    "avatar.rpc.health": (),
    "avatar.rpc.status": ("avatar.errors",),
    "avatar.rpc.channel": (),
    "avatar.rpc.tls": (),
    "avatar.rpc.wire": ("avatar.worker",),
    "avatar.rpc.interceptor": ("avatar.errors", "avatar.rpc.status", "avatar.rpc.wire", "avatar.telemetry"),
    "avatar.rpc.server": ("avatar.errors", "avatar.rpc.channel", "avatar.rpc.interceptor"),
    "avatar.rpc.client": ("avatar.aio", "avatar.errors", "avatar.rpc.status", "avatar.rpc.wire", "avatar.worker"),
    "avatar.failover": (
        *("avatar.aio", "avatar.errors", "avatar.handoff.client", "avatar.rpc", "avatar.telemetry", "avatar.worker"),
    ),
    "avatar.handoff.chain": ("avatar.errors", "avatar.types"),
    "avatar.handoff.client": (
        *("avatar.aio", "avatar.rpc.client", "avatar.rpc.status", "avatar.rpc.wire", "avatar.worker"),
    ),
    # Used by product teams.
    "avatar.client": (
        *("avatar.aio", "avatar.errors", "avatar.rpc.channel", "avatar.rpc.status", "avatar.rpc.tls", "avatar.v1"),
    ),
    "avatar.integrations": ("avatar.aio", "avatar.client"),
    # Files and the command line.
    "avatar.media": ("avatar.audio", "avatar.vae"),
    "avatar.checkpoints.inspect": (
        *("avatar.audio", *_FILES, "avatar.checkpoints.decoders", "avatar.checkpoints.layouts"),
        *("avatar.checkpoints.lora", "avatar.checkpoints.sizing", "avatar.denoiser", "avatar.text", "avatar.vae"),
    ),
    "avatar.checkpoints.sizing": ("avatar.denoiser", "avatar.types"),
    "avatar.render": (
        *("avatar.audio", "avatar.checkpoints", "avatar.denoiser", "avatar.media", "avatar.types", "avatar.vae"),
    ),
    "avatar.__main__": (
        *("avatar.checkpoints", "avatar.media", "avatar.render", "avatar.text", "avatar.types", "avatar.vae"),
    ),
    # Processes. Nobody imports them.
    "services.address": ("avatar.settings",),
    "services.process": ("avatar.errors", "avatar.telemetry"),
    "services.registration": ("avatar.aio", "avatar.errors", "avatar.rpc.server", "avatar.store", "avatar.worker"),
    "services.worker": (
        *("avatar.checkpoints", "avatar.rpc", "avatar.runtime", "avatar.settings", "avatar.store", "avatar.telemetry"),
        *("services.address", "services.registration"),
    ),
    "services.audio": (*_WORKER, "avatar.audio"),
    # The sizes to warm up for follow from the rule of pictures, which needs no model.
    "services.denoiser": (*_WORKER, "avatar.denoiser", "avatar.handoff.chain", "avatar.vae.picture.rule"),
    "services.text": (*_WORKER, "avatar.text"),
    "services.vae": (*_WORKER, "avatar.vae"),
    "services.voice": (
        *("avatar.aio", "avatar.errors", "avatar.rpc", "avatar.runtime.admission", "avatar.settings", "avatar.store"),
        *("avatar.telemetry", "avatar.worker", "services.address", "services.process", "services.registration"),
    ),
    "services.gateway": (
        *("avatar.aio", "avatar.errors", "avatar.failover", "avatar.handoff.client", "avatar.rpc"),
        *("avatar.runtime.admission", "avatar.settings"),
        *("avatar.store", "avatar.telemetry", "avatar.v1", "avatar.worker", "services.address", "services.process"),
    ),
    "services.device": (
        *("avatar.rpc.server", "avatar.settings", "services.audio", "services.denoiser", "services.process"),
        *("services.registration", "services.text", "services.vae", "services.worker"),
    ),
    "services.local": (
        *("avatar", "services.address", "services.audio", "services.denoiser", "services.gateway", "services.process"),
        *("services.registration", "services.text", "services.vae", "services.voice", "services.worker"),
    ),
    "services.__main__": ("services.local", "services.process"),
    "services": (),
    "training": ("avatar",),
    "web.playout": ("avatar.client",),
    "web.pending_speech": ("web.playout",),
    "web.page_requests": (),
    "web.words": ("avatar.client", "avatar.errors"),
    "web.browser_session": ("avatar.aio", "avatar.client", "web.pending_speech", "web.playout", "web.words"),
    "web": (
        *("avatar.client", "avatar.errors", "avatar.v1"),
        *("web.browser_session", "web.page_requests", "web.pending_speech", "web.playout", "web.words"),
    ),
    # Benchmarks measure the suite from outside, and only start its processes.
    "benchmarks": ("avatar", "services.local", "services.registration"),
}

# The modules of avatar.rpc that open no tensor: all but the codec.
_MESSAGES = ("channel", "client", "health", "interceptor", "server", "status", "tls", "wire")
_TENSORS = ("torch", "numpy", "einops", "transformers", "diffusers", "safetensors")
_STREAMS = ("asyncio", "grpc", "redis", "google.protobuf", "opentelemetry")

# Packages of others that each part must not import.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("avatar.aio", "avatar.errors", "avatar.settings", "avatar.store"), _TENSORS),
    "avatar.telemetry": _TENSORS,
    **dict.fromkeys(("avatar.integrations", "avatar.client"), _TENSORS),
    "avatar.types": _STREAMS,
    **dict.fromkeys(("avatar.audio", "avatar.checkpoints", "avatar.text", "avatar.vae"), _STREAMS),
    "avatar.denoiser": (*_STREAMS, "transformers", "diffusers"),
    **dict.fromkeys(("avatar.runtime", "avatar.runtime.admission"), (*_TENSORS, "grpc", "redis", "google.protobuf")),
    **dict.fromkeys(("avatar.failover", "avatar.handoff.client"), _TENSORS),
    **dict.fromkeys((f"avatar.rpc.{name}" for name in _MESSAGES), _TENSORS),
    "services.gateway": _TENSORS,
}

FOLDERS = ("avatar", "services", "training", "benchmarks", "web")


@dataclass(frozen=True)
class Import:
    """One imported name: the importing module, the full name, and the line."""

    module: str
    name: str
    line: int
    is_for_types: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.name}"


def files(*folders: str) -> Iterator[Path]:
    """Yield our Python files, without those generated from protos/."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.stem.endswith(("_pb2", "_pb2_grpc")):
                yield path


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@functools.cache
def imports() -> tuple[Import, ...]:
    """Return every import in our files, at any depth."""
    found = []
    for path in files(*FOLDERS):
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        for_types = {id(node) for block in nodes if is_for_types(block) for node in ast.walk(block)}
        for node in nodes:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}:{node.lineno} imports relatively; write the whole name"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            found += [Import(module_of(path), name, node.lineno, id(node) in for_types) for name in names]
    return tuple(found)


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def lies_in(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def part_of(module: str) -> str:
    """Return the narrowest part of the table that contains a module."""
    return max((part for part in ALLOWED if lies_in(module, (part,))), key=len, default="")


def is_ours(name: str) -> bool:
    return lies_in(name, ("avatar", "services", "training", "benchmarks", "web", "tests"))


def test_imports_are_found_at_any_depth() -> None:
    seen = {(each.module, each.name) for each in imports()}
    assert ("avatar.audio.whisper", "transformers.models.whisper.modeling_whisper.WhisperEncoder") in seen
    assert ("services.gateway.service", "services.gateway.workers.Workers") in seen
    assert [str(each) for each in imports() if each.is_for_types and each.module == "avatar.types"]


def test_every_module_belongs_to_a_part() -> None:
    modules = {module_of(path) for path in files(*FOLDERS)}
    assert [
        module for module in modules if not part_of(module) and module not in ("avatar", "avatar.handoff", "avatar.rpc")
    ] == []


def test_imports_point_one_way() -> None:
    wrong = [
        str(each)
        for each in imports()
        if is_ours(each.name)
        and not lies_in(each.name, ALLOWED.get(part_of(each.module), ()))
        and part_of(each.name) != part_of(each.module)
    ]
    assert wrong == []


def test_the_table_itself_points_one_way() -> None:
    names = {"avatar", *ALLOWED}
    graph = {part: {name for name in names if lies_in(name, allowed)} for part, allowed in ALLOWED.items()}
    TopologicalSorter(graph).prepare()  # CycleError if there is a way back


def test_no_files_import_each_other_in_a_cycle() -> None:
    modules = {module_of(path) for path in files(*FOLDERS)}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for each in imports():
        imported = each.name if each.name in modules else each.name.rpartition(".")[0]
        if imported in modules:
            graph[each.module].add(imported)
    TopologicalSorter(graph).prepare()  # CycleError names the files of a cycle


def test_no_part_imports_a_forbidden_package() -> None:
    wrong = [
        str(each)
        for each in imports()
        if not each.is_for_types and lies_in(each.name, FORBIDDEN.get(part_of(each.module), ()))
    ]
    assert wrong == []


def test_only_the_codec_handles_both_tensors_and_messages() -> None:
    tensors = {each.module for each in imports() if lies_in(each.name, ("torch",))}
    messages = {
        each.module for each in imports() if lies_in(each.name, ("google.protobuf", "avatar.v1", "avatar.worker"))
    }
    assert tensors & messages == {"avatar.rpc.codec"}


def test_only_telemetry_imports_opentelemetry() -> None:
    assert {each.module for each in imports() if lies_in(each.name, ("opentelemetry",))} == {"avatar.telemetry"}


def test_no_private_module_of_a_dependency_is_imported() -> None:
    assert [str(each) for each in imports() if not is_ours(each.name) and re.search(r"\._[^_]", each.name)] == []


def modules_loaded_by(program: str) -> set[str]:
    """Return the modules that a fresh process has loaded after a program."""
    lines = f"{program}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_the_gateway_loads_no_tensor_library() -> None:
    loaded = packages(modules_loaded_by("import services.gateway.__main__"))
    assert "grpc" in loaded
    assert loaded & {*_TENSORS, "soxr", "av", "PIL"} == set()


def test_the_client_loads_its_wheels_dependencies_and_neither_settings_nor_a_server() -> None:
    needed = packages(modules_loaded_by("import grpc.aio, google.rpc.error_details_pb2, google.rpc.status_pb2"))
    loaded = modules_loaded_by("import avatar.client")
    assert packages(loaded) - set(sys.stdlib_module_names) - needed == {"avatar"}
    expected = {"aio", "client", "errors", "rpc", "rpc.channel", "rpc.status", "rpc.tls", "v1"}
    ours = {name.removeprefix("avatar.") for name in loaded if name.startswith("avatar.")}
    assert {name for name in ours if not name.startswith(("client.", "v1."))} == expected


BUILD = """
from pathlib import Path
from avatar.runtime.device_queue import DeviceQueue
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from avatar.settings import DenoiserSettings, VaeSettings
from services.denoiser.__main__ import build as build_denoiser
from services.vae.__main__ import build as build_vae
store, checkpoint = SessionStore(RedisHashes("redis://127.0.0.1")), Path({checkpoint!r})
with DeviceQueue() as queue:
    build_denoiser(DenoiserSettings(checkpoint=checkpoint), store, queue)
    build_vae(VaeSettings(checkpoint=checkpoint), queue)
"""


def test_a_denoiser_and_the_light_codec_load_neither_transformers_nor_diffusers(checkpoint: Path) -> None:
    loaded = packages(modules_loaded_by(BUILD.format(checkpoint=str(checkpoint))))
    assert "torch" in loaded
    assert loaded & {"transformers", "diffusers"} == set()


def test_generated_code_is_not_committed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "avatar/types.py" in listed
    assert [name for name in listed if Path(name).stem.endswith(("_pb2", "_pb2_grpc"))] == []
