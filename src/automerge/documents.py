"""Documents: the versioned JSON files that flow between the stages.

Every document names its format and version, is read strictly (an unknown key is an error, not a surprise later) and is
written to a temporary name and renamed, so that a reader never sees half of one.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from automerge.errors import SpecError


class Model(BaseModel):
    """A part of a document: frozen, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Document(Model):
    """A whole JSON file with a ``format`` name and a ``version``.

    A subclass sets ``FORMAT``; ``version`` grows when an old reader could misread a new file.
    """

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int] = 1

    format: str = ""
    version: int = 0

    def model_post_init(self, context: Any, /) -> None:
        """Stamp format and version on a document made in memory."""
        if not self.format:
            object.__setattr__(self, "format", self.FORMAT)
            object.__setattr__(self, "version", self.VERSION)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and validate one document.

        Raises:
            SpecError: the file is missing, is not JSON, or is not a document of this format and version.
        """
        try:
            value = json.loads(path.read_bytes())
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise SpecError(f"{path}: {reason}", f"{_writer(cls.FORMAT)} writes it") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SpecError(
                f"{path}: not valid JSON ({error})", f"have it written again by {_writer(cls.FORMAT)}"
            ) from None
        return cls.parse(value, where=str(path))

    @classmethod
    def parse(cls, value: Any, where: str) -> Self:
        """Validate one document that was already decoded; ``where`` names it in the error."""
        if not isinstance(value, dict) or value.get("format") != cls.FORMAT:
            found = value.get("format") if isinstance(value, dict) else None
            named = f", its format is {found}" if isinstance(found, str) else ""
            raise SpecError(f"{where}: not of the format {cls.FORMAT}{named}", f"pass what {_writer(cls.FORMAT)} wrote")
        if value.get("version") != cls.VERSION:
            raise SpecError(
                f"{where}: {cls.FORMAT} version {json.dumps(value.get('version'))} is not readable by this release, "
                f"which reads version {cls.VERSION}",
                "use the release that wrote it",
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise SpecError(
                f"{where}: {key}: {_REASONS.get(first['type'], first['msg'])}",
                f"have it written again by {_writer(cls.FORMAT)}",
            ) from None

    def write(self, path: Path) -> Path:
        """Write the document as indented JSON, atomically; returns ``path``."""
        write_atomically(path, (self.model_dump_json(indent=2) + "\n").encode())
        return path

    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON: sorted keys, no white space. Equal content, equal digest."""
        return digest_of(self.model_dump(mode="json"))


_WRITERS = {"manifest": "fetch", "segmentation": "segment", "recipe": "search", "merged": "merge"}
_WRITERS |= {"front": "search", "evaluation": "evaluate", "registration": "register"}
_REASONS = {"missing": "this key is missing", "extra_forbidden": "unknown key"}


def _writer(format_name: str) -> str:
    """The command that writes documents of a format, for errors."""
    name = format_name.removeprefix("automerge/")
    return f"`automerge {_WRITERS[name]}`" if name in _WRITERS else f"the writer of {format_name}"


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON value in canonical form: sorted keys, no white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` under a temporary name in the same folder, fsync, then rename over ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
