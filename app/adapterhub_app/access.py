"""Who may do what: optional logins, each with a role. Knows passwords and roles, not the page.

Without logins everybody has the role `open_role`: admin on the machine's own loopback, viewer on a public Space.
"""

import hmac
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, TypeAdapter, ValidationError

from adapterhub_lite.adapter_format.strict_reading import StrictModel
from adapterhub_lite.errors import ConfigurationError, UsageError

Role = Literal["viewer", "admin"]


class Login(StrictModel):
    """One person's password and role: viewers ask and compare, admins also promote, roll back, push, pull and save."""

    password: Annotated[SecretStr, Field(min_length=8)]
    role: Role = "viewer"


_LOGINS: TypeAdapter[dict[str, Login]] = TypeAdapter(dict[str, Login])


@dataclass(frozen=True)
class Access:
    """The logins of an app, and the role everybody has when there are none."""

    logins: dict[str, Login] = field(default_factory=dict)
    open_role: Role = "admin"

    @classmethod
    def read(cls, path: str | Path) -> "Access":
        """Read a JSON file of the form {"ana": {"password": "...", "role": "admin"}, ...}.

        Raises:
            ConfigurationError: the file is missing, malformed, empty, or readable by other users of this machine.
        """
        file = Path(path)
        try:
            if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
                raise ConfigurationError(f"{file} holds passwords and other users can read it. Run chmod 600 on it.")
            logins = _LOGINS.validate_json(file.read_bytes())
        except OSError as error:
            raise ConfigurationError(f"The logins file {file} cannot be read: {error.strerror}.") from error
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ConfigurationError(
                f"{file} is not a valid logins file: {where}: {first['msg']}. "
                'Expected {"ana": {"password": "8 characters or more", "role": "admin"}}.'
            ) from error
        if not logins:
            raise ConfigurationError(
                f"{file} contains no logins, so nobody could log in. Add one, or start without the file."
            )
        return cls(logins)

    @property
    def has_login(self) -> bool:
        """Whether people must log in."""
        return bool(self.logins)

    def check(self, name: str, password: str) -> bool:
        """Whether the password matches; takes equally long for unknown names."""
        login = self.logins.get(name)
        expected = login.password.get_secret_value() if login else ""
        return hmac.compare_digest(expected.encode(), password.encode()) and login is not None

    def role_of(self, name: str | None) -> Role:
        """The role of a logged-in person, or of everybody when there are no logins."""
        if not self.has_login:
            return self.open_role
        login = self.logins.get(name or "")
        return login.role if login else "viewer"

    def require_admin(self, name: str | None, action: str) -> None:
        """Return if the person may do the write action.

        Raises:
            UsageError: they are not an admin.
        """
        if self.role_of(name) != "admin":
            who = f"{name} is a viewer" if name else "This app is open for viewing"
            raise UsageError(f"{who}, and only an admin may {action}. Ask an admin, or log in as one.")
