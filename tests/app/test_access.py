"""Logins and roles: who may come in, who may write, and which login files are refused."""

import json
from pathlib import Path

import pytest

from adapterhub_app.access import Access
from adapterhub_lite.errors import ConfigurationError, UsageError

TWO = {"ana": {"password": "long enough", "role": "admin"}, "bo": {"password": "also long enough"}}


@pytest.fixture
def logins(tmp_path: Path) -> Path:
    """A logins file of an admin and a viewer."""
    file = tmp_path / "logins.json"
    file.write_text(json.dumps(TWO))
    file.chmod(0o600)
    return file


def test_a_login_opens_with_its_own_password_only(logins: Path) -> None:
    access = Access.read(logins)
    assert access.has_login and access.check("ana", "long enough")
    for name, password in (("ana", "also long enough"), ("ana", ""), ("eve", ""), ("eve", "long enough")):
        assert not access.check(name, password)


def test_only_admins_write_and_strangers_are_viewers(logins: Path) -> None:
    access = Access.read(logins)
    access.require_admin("ana", "push")
    for name in ("bo", "eve", None):
        with pytest.raises(UsageError, match="only an admin may push"):
            access.require_admin(name, "push")


def test_without_logins_everybody_has_the_open_role() -> None:
    Access().require_admin(None, "push")
    with pytest.raises(UsageError, match="open for viewing"):
        Access(open_role="viewer").require_admin(None, "push")


def test_passwords_are_never_printed(logins: Path) -> None:
    assert "long enough" not in repr(Access.read(logins))


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", '{"ana": {"password": "short"}}', '{"ana": {"password": "long enough", "role": "root"}}'],
)
def test_a_file_that_is_no_logins_file_is_refused(logins: Path, content: str) -> None:
    logins.write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        Access.read(logins)
    assert "short" not in str(caught.value)


def test_a_file_that_others_can_read_or_that_is_not_there_is_refused(logins: Path) -> None:
    logins.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        Access.read(logins)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Access.read(logins.with_name("none.json"))
