"""Tests of avatar.settings."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from avatar.rpc import channel
from avatar.settings import (
    MAX_CONTENT_BYTES,
    AudioSettings,
    DenoiserSettings,
    GatewaySettings,
    Settings,
    TextSettings,
    VaeSettings,
    WorkerSettings,
    load,
)

SERVICES: list[type[Settings]] = [AudioSettings, DenoiserSettings, TextSettings, VaeSettings, GatewaySettings]


def test_construction_ignores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVATAR_CAPACITY", "3")
    assert AudioSettings() == load(AudioSettings, {})


def test_each_service_has_its_own_port() -> None:
    assert len({load(cls, {}).listen for cls in SERVICES}) == len(SERVICES)


def test_the_gateways_default_targets_are_the_workers_ports() -> None:
    gateway = load(GatewaySettings, {})
    assert gateway.audio == (load(AudioSettings, {}).listen,)
    assert gateway.vae == (load(VaeSettings, {}).listen,)
    assert gateway.denoisers[0] == load(DenoiserSettings, {}).listen


def test_a_field_comes_from_the_variable_of_its_name() -> None:
    environ = {
        "AVATAR_LISTEN": "0.0.0.0:0",
        "AVATAR_CHECKPOINT": "/models/large",
        "AVATAR_CAPACITY": "3",
        "AVATAR_DRAIN_S": "2.5",
        "AVATAR_LEVELS": "0,2",
        "AVATAR_COMPILE": "true",
    }
    settings = load(DenoiserSettings, environ)
    assert settings == DenoiserSettings(
        listen="0.0.0.0:0", checkpoint=Path("/models/large"), capacity=3, drain_s=2.5, levels="0,2", compile=True
    )
    assert isinstance(settings.drain_s, float)


def test_a_list_is_separated_by_commas() -> None:
    settings = load(GatewaySettings, {"AVATAR_DENOISERS": "one:1, two:2,three:3"})
    assert settings.denoisers == ("one:1", "two:2", "three:3")
    assert load(DenoiserSettings, {"AVATAR_SIZES": ""}).sizes == ()


def test_unrelated_variables_are_ignored() -> None:
    assert load(AudioSettings, {"CAPACITY": "3", "AVATAR_SESSION_TTL_S": "no", "PATH": "/bin"}) == AudioSettings()


@pytest.mark.parametrize(
    ("cls", "name", "text", "expected"),
    [
        (WorkerSettings, "AVATAR_CAPACITY", "many", "int"),
        (WorkerSettings, "AVATAR_CAPACITY", "", "int"),
        (WorkerSettings, "AVATAR_THREADS", "1.5", "int"),
        (GatewaySettings, "AVATAR_SESSION_TTL_S", "5 min", "float"),
        (WorkerSettings, "AVATAR_DEVICE", "gpu", "cpu, cuda or cuda:N"),
        (WorkerSettings, "AVATAR_DEVICE", "cuda:", "cpu, cuda or cuda:N"),
        (WorkerSettings, "AVATAR_DTYPE", "float16", "float32 or bfloat16"),
        (DenoiserSettings, "AVATAR_COMPILE", "maybe", "true or false"),
        (Settings, "AVATAR_LOG_LEVEL", "LOUD", "DEBUG, INFO, WARNING or ERROR"),
        (Settings, "AVATAR_REDIS_URL", "127.0.0.1:6379", "redis://HOST:PORT"),
        (Settings, "AVATAR_LISTEN", "everywhere", "HOST:PORT"),
        (Settings, "AVATAR_ADVERTISE", "here", "HOST:PORT"),
        (Settings, "AVATAR_CELL", "one:1", "lower-case letters, digits and -"),
        (DenoiserSettings, "AVATAR_CHAIN", "one", "HOST:PORT"),
        (GatewaySettings, "AVATAR_AUDIO", "worker", "HOST:PORT"),
        (GatewaySettings, "AVATAR_DENOISERS", "one:1,,two:2", "HOST:PORT"),
        (GatewaySettings, "AVATAR_TEXT", "text:", "HOST:PORT"),
        (GatewaySettings, "AVATAR_VAE", "", "at least one HOST:PORT"),
    ],
)
def test_an_unusable_value_is_named(cls: type[Settings], name: str, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is '.*', expected {expected}"):
        load(cls, {"AVATAR_LISTEN": "127.0.0.1:0", name: text})


def test_the_error_does_not_contain_the_password() -> None:
    with pytest.raises(ValueError, match=r"AVATAR_REDIS_URL is 'redis:6379', expected redis://") as caught:
        load(GatewaySettings, {"AVATAR_REDIS_URL": "redis:/user:se@cret@redis:6379"})
    assert "cret" not in f"{caught.value} {caught.value.__cause__}"


NUMBERS = [
    (cls, name) for cls in SERVICES for name, each in cls.model_fields.items() if each.annotation in (int, float)
]


@pytest.mark.parametrize(("cls", "field"), NUMBERS)
def test_a_negative_or_infinite_number_is_refused(cls: type[Settings], field: str) -> None:
    name = f"AVATAR_{field.upper()}"
    for text in ("-1", "nan", "inf"):
        with pytest.raises(ValueError, match=f"{name} is '{text}'"):
            load(cls, {name: text})


# kept_bytes is memory, and no message.
@pytest.mark.parametrize(("cls", "field"), [each for each in NUMBERS if each[1] != "kept_bytes"])
def test_a_number_that_would_fail_only_while_serving_is_refused(cls: type[Settings], field: str) -> None:
    name = f"AVATAR_{field.upper()}"
    with pytest.raises(ValueError, match=f"{name} is '.*', expected at most [0-9]+$"):
        load(cls, {name: "1e300" if field.endswith("_s") else str(1 << 40)})


def test_the_largest_message_of_a_client_can_be_passed_on_to_a_worker() -> None:
    for field in ("picture", "audio", "prompt"):
        name = f"AVATAR_MAX_{field.upper()}_BYTES"
        settings = load(GatewaySettings, {name: str(MAX_CONTENT_BYTES)})
        assert settings.max_message_bytes == channel.MAX_MESSAGE_BYTES
        with pytest.raises(ValueError, match=f"{name} is .*, expected at most {MAX_CONTENT_BYTES}"):
            load(GatewaySettings, {name: str(MAX_CONTENT_BYTES + 1)})


def test_a_duration_is_a_year_at_most() -> None:
    assert load(GatewaySettings, {"AVATAR_SESSION_TTL_S": "31536000"}).session_ttl_s == 31536000
    with pytest.raises(ValueError, match="AVATAR_SESSION_TTL_S is '31536001', expected at most 31536000"):
        load(GatewaySettings, {"AVATAR_SESSION_TTL_S": "31536001"})


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (Settings, "AVATAR_LISTEN"),
        (Settings, "AVATAR_ADVERTISE"),
        (DenoiserSettings, "AVATAR_CHAIN"),
        (GatewaySettings, "AVATAR_VAE"),
    ],
)
def test_a_port_is_65535_at_most(cls: type[Settings], name: str) -> None:
    environ = {"AVATAR_LISTEN": "127.0.0.1:0"}
    load(cls, environ | {name: "[::1]:65535"})
    for port in ("65536", "99999", "\u0661"):
        with pytest.raises(ValueError, match=f"{name} is .*, expected HOST:PORT with a port of at most 65535"):
            load(cls, environ | {name: f"127.0.0.1:{port}"})


def test_sizes_are_widths_and_heights() -> None:
    assert DenoiserSettings(sizes=("704x384", "512x512")).video_sizes() == [(704, 384), (512, 512)]
    for wrong in ("704", "704x", "704*384", ""):
        with pytest.raises(ValueError, match=r"AVATAR_SIZES is '704x384,.*expected a list"):
            DenoiserSettings(sizes=("704x384", wrong)).video_sizes()


def test_a_variable_without_a_default_must_be_set() -> None:
    with pytest.raises(ValueError, match="AVATAR_LISTEN is not set"):
        load(Settings, {})


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        AudioSettings().capacity = 9


@pytest.mark.parametrize("cls", [Settings, WorkerSettings, *SERVICES])
def test_every_field_is_documented(cls: type[Settings]) -> None:
    documented = " ".join(each.__doc__ or "" for each in cls.__mro__)
    assert [name for name in cls.model_fields if name not in documented] == []


@pytest.mark.parametrize(
    ("levels", "served"), [("all", [0, 1, 2, 3]), ("0", [0]), ("3", [3]), ("0,2", [0, 2]), ("1, 2", [1, 2])]
)
def test_levels_are_served_as_listed(levels: str, served: list[int]) -> None:
    assert DenoiserSettings(levels=levels).served_levels(4) == served


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ("4", "names level 4, the schedule has 0 to 3"),
        ("0,-1", "names level -1, the schedule has 0 to 3"),
        ("none", "'none', expected `all` or a list"),
        ("0,", "'0,', expected `all` or a list"),
        ("", "'', expected `all` or a list"),
        ("0,0", "'0,0', expected each level once"),
        ("1,0, 1", "'1,0, 1', expected each level once"),
    ],
)
def test_levels_that_the_checkpoint_lacks_are_refused(levels: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"AVATAR_LEVELS.*{words}"):
        DenoiserSettings(levels=levels).served_levels(4)


@pytest.mark.parametrize("cls", [DenoiserSettings, GatewaySettings])
@pytest.mark.parametrize(
    ("text", "expected"),
    [("", None), ("2", 2), ("1", 1), ("1,0.602", (1.0, 0.602)), ("1, 0.75, .5", (1.0, 0.75, 0.5)), ("0.9", (0.9,))],
)
def test_a_schedule_is_a_number_of_levels_or_their_sigmas(
    cls: type[DenoiserSettings | GatewaySettings], text: str, expected: int | tuple[float, ...] | None
) -> None:
    assert load(cls, {"AVATAR_SCHEDULE": text}).schedule == expected
    for bad in ("two", "0", "-1", "1,2", "1,0", "1.5", "1,,0.5", "nan"):
        with pytest.raises(ValueError, match=f"AVATAR_SCHEDULE is '{bad}', expected a number of levels, or the sigmas"):
            load(cls, {"AVATAR_SCHEDULE": bad})


def test_an_optional_path_is_none_unless_set() -> None:
    assert load(DenoiserSettings, {"AVATAR_ADAPTER": ""}).adapter is None
    settings = load(DenoiserSettings, {"AVATAR_ADAPTER": "/models/adapter.safetensors", "AVATAR_ADAPTER_ALPHA": "32"})
    assert (settings.adapter, settings.adapter_alpha) == (Path("/models/adapter.safetensors"), 32.0)
