"""How a command of the command line ended."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Done:
    """A command's exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one sentence of a command that a user's mistake ended."""
        lines = [line for line in self.err.splitlines() if not line.startswith("notice: ")]
        assert self.code == 2, self
        assert len(lines) == 1, self
        assert lines[0].startswith("error: "), self
        return lines[0].removeprefix("error: ")


Command = Callable[..., Done]
