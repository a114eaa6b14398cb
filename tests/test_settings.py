"""Tests of avatar.settings."""

from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from avatar.settings import (
    AudioSettings,
    DenoiserSettings,
    GatewaySettings,
    Settings,
    TextSettings,
    VaeSettings,
    WorkerSettings,
    load,
)

SERVICES = [AudioSettings, DenoiserSettings, TextSettings, VaeSettings, GatewaySettings]


@pytest.mark.parametrize("cls", SERVICES)
def test_an_empty_environment_gives_the_defaults(cls: type[Settings]) -> None:
    assert load(cls, {}) == cls(listen=load(cls, {}).listen)


def test_each_service_listens_at_a_port_of_its_own() -> None:
    listens: list[str] = [load(cls, {}).listen for cls in SERVICES]
    assert len(set(listens)) == len(listens)


def test_the_gateways_defaults_are_where_the_workers_listen() -> None:
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
    }
    settings = load(DenoiserSettings, environ)
    assert settings == DenoiserSettings(
        listen="0.0.0.0:0", checkpoint=Path("/models/large"), capacity=3, drain_s=2.5, levels="0,2"
    )
    assert isinstance(settings.drain_s, float)


def test_a_list_is_parted_at_commas() -> None:
    settings = load(GatewaySettings, {"AVATAR_DENOISERS": "one:1, two:2,three:3"})
    assert settings.denoisers == ("one:1", "two:2", "three:3")


def test_other_variables_are_left_alone() -> None:
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
        (DenoiserSettings, "AVATAR_COMPILE", "1", "true or false"),
        (Settings, "AVATAR_LOG_LEVEL", "LOUD", "DEBUG, INFO, WARNING or ERROR"),
        (Settings, "AVATAR_REDIS_URL", "127.0.0.1:6379", "redis://HOST:PORT"),
        (DenoiserSettings, "AVATAR_CHAIN", "one", "HOST:PORT"),
        (GatewaySettings, "AVATAR_AUDIO", "worker", "HOST:PORT"),
        (GatewaySettings, "AVATAR_DENOISERS", "one:1,,two:2", "HOST:PORT"),
        (GatewaySettings, "AVATAR_TEXT", "text:", "HOST:PORT"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(cls: type[Settings], name: str, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is '.*', expected {expected}"):
        load(cls, {"AVATAR_LISTEN": "127.0.0.1:0", name: text})


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(ValueError, match=r"AVATAR_REDIS_URL is 'redis:6379', expected redis://") as caught:
        load(GatewaySettings, {"AVATAR_REDIS_URL": "redis:/user:se@cret@redis:6379"})
    assert "cret" not in str(caught.value)


NUMBERS = [(cls, each.name) for cls in SERVICES for each in fields(cls) if each.type in (int, float)]


@pytest.mark.parametrize(("cls", "field"), NUMBERS)
def test_no_quantity_is_negative_or_endless(cls: type[Settings], field: str) -> None:
    name = f"AVATAR_{field.upper()}"
    for text in ("-1", "nan", "inf"):
        with pytest.raises(ValueError, match=f"{name} is '?{text}"):
            load(cls, {name: text})


@pytest.mark.parametrize("cls", SERVICES)
def test_an_address_without_a_port_is_named(cls: type[Settings]) -> None:
    with pytest.raises(ValueError, match="AVATAR_LISTEN is 'everywhere', expected HOST:PORT"):
        load(cls, {"AVATAR_LISTEN": "everywhere"})


@pytest.mark.parametrize(("text", "meant"), [("true", True), ("false", False)])
def test_a_switch_is_true_or_false(text: str, meant: bool) -> None:
    assert load(DenoiserSettings, {"AVATAR_COMPILE": text}).compile is meant


def test_sizes_are_widths_and_heights() -> None:
    assert DenoiserSettings(sizes=("704x384", "512x512")).pictures() == [(704, 384), (512, 512)]
    for wrong in ("704", "704x", "704*384", ""):
        with pytest.raises(ValueError, match=r"AVATAR_SIZES is '704x384,.*expected a list"):
            DenoiserSettings(sizes=("704x384", wrong)).pictures()


def test_a_variable_without_a_default_must_be_set() -> None:
    with pytest.raises(ValueError, match="AVATAR_LISTEN is not set"):
        load(Settings, {})


def test_settings_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        AudioSettings().capacity = 9  # type: ignore[misc]


@pytest.mark.parametrize("cls", [Settings, WorkerSettings, *SERVICES])
def test_every_setting_is_explained(cls: type[Settings]) -> None:
    explained = " ".join(each.__doc__ or "" for each in cls.__mro__)
    assert [field.name for field in fields(cls) if field.name not in explained] == []


@pytest.mark.parametrize(
    ("levels", "served"), [("all", [0, 1, 2, 3]), ("0", [0]), ("3", [3]), ("0,2", [0, 2]), ("1, 2", [1, 2])]
)
def test_levels_are_served_as_listed(levels: str, served: list[int]) -> None:
    assert DenoiserSettings(levels=levels).served(4) == served


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ("4", "names level 4, the checkpoint has 0 to 3"),
        ("0,-1", "names level -1, the checkpoint has 0 to 3"),
        ("none", "'none', expected `all` or a list"),
        ("0,", "'0,', expected `all` or a list"),
        ("", "'', expected `all` or a list"),
    ],
)
def test_levels_that_are_not_there_are_refused(levels: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"AVATAR_LEVELS.*{words}"):
        DenoiserSettings(levels=levels).served(4)


def test_an_adapter_is_a_path_or_nothing() -> None:
    assert load(DenoiserSettings, {}).adapter is None
    settings = load(DenoiserSettings, {"AVATAR_ADAPTER": "/models/adapter.safetensors", "AVATAR_ADAPTER_ALPHA": "32"})
    assert (settings.adapter, settings.adapter_alpha) == (Path("/models/adapter.safetensors"), 32.0)
