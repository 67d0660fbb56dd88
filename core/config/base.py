"""The base of every model: frozen, closed to unknown keys, named in the file by aliases."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of the file. An unknown key is an error; values cannot change once validated."""

    # hide_input: a pydantic error that escaped must not carry a secret into a log.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
