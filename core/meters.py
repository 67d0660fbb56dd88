"""What every meter ever counted in: pinned in Postgres, because a count cannot be rescaled.

Redis and the scripts count in smallest units, so a meter's `decimals` and `aggregation` are part
of every number that was counted with it. The first process that uses a meter pins both. From then
on they hold for ever, also for a meter that the configuration no longer has: its counts go on
being flushed and seeded, and are right when it is declared again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from core.db.pool import Database, Transaction
from core.errors import ConfigError
from core.policy import Aggregation, Meter, changed_meters
from core.telemetry import logs

_log = logs.get_logger()

# How long a process that serves already waits between two attempts to pin.
_RETRY_S = 0.25


class MeterRegistry:
    """The meters of the configuration and all that were ever pinned.

    `source` names the configuration in messages.
    """

    def __init__(self, meters: Mapping[str, Meter], source: str = "configuration") -> None:
        self._declared = dict(meters)
        self._pinned: dict[str, Meter] = {}
        self._source = source
        self.pinned = False
        """Whether every declared meter is pinned."""
        self._told = False

    def get(self, name: str) -> Meter | None:
        """The meter as its counts are to be read; None when no process ever declared it."""
        pinned, declared = self._pinned.get(name), self._declared.get(name)
        if pinned is None or declared is None:
            return pinned or declared
        same = (pinned.decimals, pinned.aggregation) == (declared.decimals, declared.aggregation)
        return declared if same else pinned  # only the configuration knows the unit

    def check(self, meters: Mapping[str, Meter]) -> None:
        """Compares the meters of a configuration with all that are known here; changes nothing.

        Raises:
            ConfigError: `decimals` or `aggregation` of a meter differ.
        """
        known = {**self._declared, **self._pinned}
        problems = changed_meters(known, meters)
        if problems:
            raise ConfigError(self._source, problems)

    def declare(self, meters: Mapping[str, Meter]) -> None:
        """Takes over the meters of a reloaded configuration, to be pinned next.

        Raises:
            ConfigError: as `check`; nothing is taken over then.
        """
        self.check(meters)
        self._declared.update(meters)
        self.pinned = False

    async def pin(self, database: Database) -> None:
        """Pins what is not pinned yet and reads all that ever was.

        Raises:
            ConfigError: a declared meter is pinned otherwise; nothing is pinned then.
            StoreUnavailableError: Postgres did not answer.
        """
        declared = dict(self._declared)
        names = sorted(declared)  # in one order, so that two processes cannot deadlock
        async with database.transaction() as transaction:
            await transaction.execute(
                "pin_meters",
                names,
                [declared[name].decimals for name in names],
                [str(declared[name].aggregation) for name in names],
            )
            await self.refresh(transaction)
            self.check(declared)
        # unless a reload brought more meanwhile
        self.pinned = self._declared.keys() <= declared.keys()

    async def try_pin(self, database: Database) -> bool:
        """As `pin`, but for a Postgres that is away or has no tables yet it returns False.

        Raises:
            ConfigError: a declared meter is pinned otherwise.
        """
        try:
            await self.pin(database)
        except ConfigError:
            raise
        except Exception as error:
            if not self._told:
                _log.warning("meters_not_pinned", reason=str(error) or repr(error))
            self._told = True
        return self.pinned

    async def pin_until_done(self, database: Database) -> None:
        """Tries to pin until it is done.

        Raises:
            ConfigError: a declared meter is pinned otherwise.
        """
        while True:
            if await self.try_pin(database):
                return
            await asyncio.sleep(_RETRY_S)

    async def refresh(self, database: Database | Transaction) -> None:
        """Reads all meters that were ever pinned.

        Raises:
            StoreUnavailableError: Postgres did not answer.
        """
        for row in await database.fetch("read_meters"):
            name = row["name"]
            self._pinned[name] = Meter(
                name,
                unit=name,  # of a meter that is not in the configuration nobody knows it
                aggregation=Aggregation(row["aggregation"]),
                decimals=row["decimals"],
            )

    async def unknown(self, database: Database | Transaction, names: Iterable[str]) -> set[str]:
        """Those of `names` that no process has declared; asks Postgres when there seem to be any.

        Raises:
            StoreUnavailableError: Postgres did not answer.
        """
        missing = {name for name in names if self.get(name) is None}
        if missing:
            await self.refresh(database)
            missing = {name for name in missing if self.get(name) is None}
        return missing


__all__ = ["MeterRegistry"]
