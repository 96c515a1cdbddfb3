"""What a request may carry: the JSON bodies, the lines of a commit, a `.gitignore`. Anything else is refused with 400."""

import base64
import binascii
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pathspec
import regex
from pathspec.pattern import RegexMatchResult
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from adapterhub_lite.hub_server.store import HubRefusal, check_path

MOST_SECONDS = 2.0


def ignored_files(patterns: str, paths: Iterable[str]) -> Sequence[str]:
    """Those of `paths` that the text of a `.gitignore` leaves out.

    Raises:
        HubRefusal: 400, a pattern is malformed, or matching takes longer than `MOST_SECONDS`.
    """
    end = time.monotonic() + MOST_SECONDS

    class Bounded(GitIgnoreSpecPattern):
        """A pattern on an engine that gives up: Python's own may take forever over `*a*a*a*b`."""

        def match_file(self, file: str) -> RegexMatchResult | None:
            if self.regex is None:
                return None
            left = max(0.001, end - time.monotonic())
            found = regex.compile(self.regex.pattern).search(file, timeout=left)
            return RegexMatchResult(found) if found else None

    try:
        spec = pathspec.GitIgnoreSpec.from_lines(patterns.splitlines(), Bounded)
        found = []
        for path in paths:
            if spec.match_file(path):
                found.append(path)
            if time.monotonic() > end:
                raise TimeoutError
    except TimeoutError:
        raise HubRefusal(
            400, "Matching the paths with .gitignore takes too long; simplify its patterns, or commit fewer files."
        ) from None
    except ValueError as error:
        raise HubRefusal(400, f".gitignore cannot be read: {str(error)[:200]}.") from None
    return found


Text = Annotated[str, Field(max_length=10_000)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, strict=True)]
Visibility = Literal["public", "private"]


class Placed(BaseModel):
    """What the real hub lets a new repository say of where it is to lie; this hub has one place."""

    resourceGroupId: str | None = None  # noqa: N815 - names of the wire
    region: str | None = None

    @field_validator("resourceGroupId", "region")
    @classmethod
    def refuse(cls, value: str | None) -> str | None:
        """Refuse what would be ignored."""
        if value is not None:
            raise ValueError("this hub has no resource groups and no regions")
        return value


class NewRepo(Placed):
    """`POST /api/repos/create`."""

    name: Name
    organization: Name | None = None
    type: Name = "model"
    visibility: Visibility | None = None
    private: bool = False


class NamedRepo(BaseModel):
    """`DELETE /api/repos/delete`."""

    name: Name
    organization: Name | None = None
    type: Name = "model"


class Move(BaseModel):
    """`POST /api/repos/move`."""

    fromRepo: Name  # noqa: N815 - names of the wire
    toRepo: Name  # noqa: N815
    type: Name = "model"


class Duplicate(Placed):
    """`POST .../duplicate`."""

    repository: Name
    visibility: Visibility | None = None
    private: bool = False


class Settings(BaseModel):
    """`PUT .../settings`; what is not given stays as it is, and what this hub does not have is refused."""

    model_config = ConfigDict(extra="forbid")

    visibility: Visibility | None = None
    private: bool | None = None
    gated: Literal["auto", "manual", False] | None = None


class NewTag(BaseModel):
    """`POST .../tag/REVISION`."""

    tag: Name
    message: Text | None = None


class NewBranch(BaseModel):
    """`POST .../branch/NAME`."""

    startingPoint: Name | None = None  # noqa: N815
    overwrite: bool = False


class Squash(BaseModel):
    """`POST .../super-squash/BRANCH`."""

    message: Text = ""


class CardText(BaseModel):
    """`POST /api/validate-yaml`."""

    content: str = ""
    repoType: Name = "model"  # noqa: N815


class PlannedFile(BaseModel):
    """One file that a client is about to upload."""

    path: str
    size: Size = 0


class Preupload(BaseModel):
    """`POST .../preupload/REVISION`."""

    files: Annotated[list[PlannedFile], Field(max_length=10_000)]
    gitIgnore: str | None = None  # noqa: N815


class LfsObject(BaseModel):
    """One content that a client has; `oid` is checked for its form where it is used."""

    oid: Name
    size: Size


class LfsBatch(BaseModel):
    """`POST .git/info/lfs/objects/batch`."""

    objects: Annotated[list[LfsObject], Field(max_length=10_000)]


class CopyTarget(BaseModel):
    """Where files are duplicated to."""

    type: Name = "model"
    name: Name


class CopiedFile(BaseModel):
    """A file that is duplicated into another repository."""

    sha256: Sha256
    filename: str = ""


class Copies(BaseModel):
    """`POST .../lfs-files/duplicate`."""

    target: CopyTarget
    files: Annotated[list[CopiedFile], Field(max_length=10_000)]


class _Header(BaseModel):
    summary: Annotated[str, Field(min_length=1, max_length=2_000)]
    description: Text | None = ""
    parentCommit: Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}$")] | None = None  # noqa: N815


class _File(BaseModel):
    path: str
    content: str
    encoding: Literal["base64", "utf-8"] = "base64"


class _LfsFile(BaseModel):
    path: str
    oid: Sha256
    algo: Literal["sha256"] = "sha256"


class _Deleted(BaseModel):
    path: str


class _HeaderLine(BaseModel):
    key: Literal["header"]
    value: _Header


class _FileLine(BaseModel):
    key: Literal["file"]
    value: _File


class _LfsLine(BaseModel):
    key: Literal["lfsFile"]
    value: _LfsFile


class _DeletedLine(BaseModel):
    key: Literal["deletedFile", "deletedFolder"]
    value: _Deleted


_LINES: TypeAdapter[list[_HeaderLine | _FileLine | _LfsLine | _DeletedLine]] = TypeAdapter(
    list[Annotated[_HeaderLine | _FileLine | _LfsLine | _DeletedLine, Field(discriminator="key")]]
)


@dataclass(frozen=True)
class CommitRequest:
    """A commit as it was asked for: `regular` is path to bytes, `large` path to sha256, folders end with `/`."""

    title: str
    description: str
    parent: str
    regular: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, str] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, body: bytes) -> "CommitRequest":
        """Read the lines of a commit (one JSON object each, the header first); 400 for anything else."""
        try:
            lines = _LINES.validate_python([json.loads(line) for line in body.splitlines() if line.strip()])
        except ValidationError as error:
            raise HubRefusal(400, f"The commit is malformed: {described(error)}.") from error
        except (ValueError, RecursionError) as error:
            raise HubRefusal(400, f"The commit is not JSON, one object per line: {error}.") from error
        if not lines or not isinstance(lines[0], _HeaderLine):
            raise HubRefusal(400, "A commit begins with its header.")
        header = lines[0].value
        found = cls(header.summary, header.description or "", header.parentCommit or "")
        for line in lines[1:]:
            if isinstance(line, _HeaderLine):
                raise HubRefusal(400, "A commit has one header.")
            path = line.value.path.rstrip("/") if isinstance(line, _DeletedLine) else line.value.path
            check_path(path)
            if isinstance(line, _FileLine):
                found.regular[path] = decode(line.value)
            elif isinstance(line, _LfsLine):
                found.large[path] = line.value.oid
            else:
                found.gone.append(path + ("/" if line.key == "deletedFolder" else ""))
        return found


def decode(file: _File) -> bytes:
    """The bytes of a file that came inside a commit; 400 when they are not what the encoding says."""
    try:
        return file.content.encode() if file.encoding == "utf-8" else base64.b64decode(file.content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HubRefusal(400, f"The content of {file.path!r:.120} is not {file.encoding}.") from error


def described(error: ValidationError) -> str:
    """The first problem of a body in a few words."""
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the body"
    return f"{where}: {first['msg']}"
