"""Tests of services.gateway.access.tenants: the file, the tokens, and the prefixes of names."""

import hashlib
import logging
from pathlib import Path

import pytest

from avatar.errors import ReferenceNotFound, SessionNotFound, Unauthenticated
from services.gateway.access.tenants import ANYONE, Tenant, Tokens, read_tenants


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of two tenants, the first with two tokens."""
    path = tmp_path / "tenants.toml"
    path.write_text(
        f"""
        [acme]
        tokens = ["{digest("old")}", "{digest("new")}"]
        max_sessions = 2
        max_audio_s = 3600

        [globex]
        tokens = ["{digest("other")}"]
        max_references = 5
        label = true
        """
    )
    return path


def test_a_token_identifies_its_tenant(path: Path) -> None:
    tokens = Tokens(path)
    acme = Tenant("acme", max_sessions=2, max_audio_s=3600)
    assert tokens.tenant("old") == tokens.tenant("new") == acme
    assert tokens.tenant("other") == Tenant("globex", max_references=5, label=True)


@pytest.mark.parametrize("token", ["", "ol", "old ", "OLD", digest("old"), "acme"])
def test_an_unknown_token_is_refused(path: Path, token: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        Tokens(path).tenant(token)
    assert caught.value.message == "the bearer token is not known"


def test_tokens_are_replaced_without_a_restart(path: Path) -> None:
    tokens = Tokens(path)
    path.write_text(f'[acme]\ntokens = ["{digest("new")}", "{digest("newer")}"]')
    assert tokens.tenant("newer") == tokens.tenant("new") == Tenant("acme")
    for gone in ("old", "other"):
        with pytest.raises(Unauthenticated):
            tokens.tenant(gone)


def test_a_broken_file_leaves_the_tenants_unchanged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens, whole = Tokens(path), path.read_text()
    for broken in ("[acme", '[acme]\ntokens = ["secret"]'):
        path.write_text(broken)
        assert tokens.tenant("old").name == "acme"
        assert tokens.tenant("old").name == "acme"
    path.unlink()
    assert tokens.tenant("other").name == "globex"
    problems = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(problems) == 3, "one for each state of the file"
    path.write_text(whole.replace(digest("old"), digest("newer")))
    assert tokens.tenant("newer").name == "acme"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[acme", "a TOML file that can be read"),
        ("acme = 1", "a table for each tenant"),
        ("['a/b']\ntokens = []", "a table for each tenant, named by letters, digits, - and _; not 'a/b'"),
        ('[acme]\ntokens = "old"', "tokens of acme as a list of sha256 digests"),
        ('[acme]\ntokens = ["old"]', "tokens of acme as a list of sha256 digests"),
        ("[acme]\ntokens = [3]", "tokens of acme as a list of sha256 digests"),
        ("[acme]\nlabel = 1", "label of acme as true or false"),
        ("[acme]\nmax_session = 3", "max_audio_s, max_references, max_sessions; not max_session"),
        ("[acme]\nname = 3", "not name"),
        ("[acme]\nmax_sessions = -1", "not max_sessions"),
        ('[acme]\nmax_sessions = "3"', "not max_sessions"),
        ("[acme]\nmax_sessions = true", "not max_sessions"),
        ("[acme]\nmax_sessions = 1.5", "not max_sessions"),
        (f'[acme]\ntokens = ["{"a" * 64}"]\n[globex]\ntokens = ["{"a" * 64}"]', "globex and acme share one"),
    ],
)
def test_an_invalid_file_is_refused_with_the_settings_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "tenants.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match="AVATAR_TENANTS is ") as caught:
        read_tenants(path)
    assert words in str(caught.value)


def test_a_missing_file_is_refused_with_the_settings_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"AVATAR_TENANTS is .*No such file"):
        Tokens(tmp_path / "nothing.toml")


def test_a_name_with_another_prefix_is_not_found() -> None:
    acme, globex = Tenant("acme"), Tenant("globex")
    name = acme.prefix + "x" * 32
    assert acme.session(name) == acme.reference(name) == name
    for stranger, theirs in ((globex, name), (acme, "x" * 48), (acme, acme.prefix[:-1]), (acme, "")):
        with pytest.raises(SessionNotFound):
            stranger.session(theirs)
        with pytest.raises(ReferenceNotFound):
            stranger.reference(theirs)


def test_a_name_over_64_characters_is_not_found() -> None:
    assert ANYONE.session("x" * 64) == "x" * 64
    for tenant in (ANYONE, Tenant("acme")):
        with pytest.raises(SessionNotFound):
            tenant.session(tenant.prefix + "x" * 65)


def test_each_tenant_has_a_prefix_and_without_tenants_there_is_none() -> None:
    assert ANYONE.prefix == ""
    assert len({Tenant("acme").prefix, Tenant("globex").prefix}) == 2
    assert len(Tenant("acme").prefix) == 16
