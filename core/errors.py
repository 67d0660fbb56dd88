"""Errors that cross a package boundary. Each message says what is wrong and how to mend it."""

from __future__ import annotations


class TallygateError(Exception):
    """Base of all expected failures; the CLI prints the message alone, without a traceback."""


class ConfigError(TallygateError):
    """The configuration is refused. `problems` holds every finding, one `path: value: fix` each."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        lines = "\n".join(f"  {problem}" for problem in problems)
        plural = "problem" if len(problems) == 1 else "problems"
        super().__init__(f"{source}: {len(problems)} {plural}\n{lines}")


class NotFoundError(TallygateError):
    """A creator, customer, subscription or key that does not exist."""


class InvalidValueError(TallygateError):
    """A field given by a person or a caller is wrong; the message names it and the fix."""


class StoreUnavailableError(TallygateError):
    """Redis or Postgres did not answer in time."""
