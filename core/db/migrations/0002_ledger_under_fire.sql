-- Hours by month, days of old months, sealed periods, usage events with an identity of their own,
-- leases of background work. Everything the release before writes and reads stays as it was.

-- Hours are partitioned by month, so that old months are dropped and not deleted row by row.
ALTER TABLE ledger_hours RENAME TO ledger_hours_flat;
ALTER INDEX ledger_hours_pkey RENAME TO ledger_hours_flat_pkey;
ALTER INDEX ledger_hours_hour RENAME TO ledger_hours_flat_hour;

CREATE TABLE ledger_hours (
    subject      text NOT NULL CHECK (subject <> ''),
    meter        text NOT NULL CHECK (meter <> ''),
    period_start timestamptz NOT NULL,
    hour_start   timestamptz NOT NULL,
    total        numeric NOT NULL CHECK (total NOT IN ('NaN', 'Infinity', '-Infinity')),
    overage      numeric NOT NULL DEFAULT 0
        CHECK (overage NOT IN ('NaN', 'Infinity', '-Infinity')),
    epoch        bigint NOT NULL,
    version      bigint NOT NULL,
    updated_at   timestamptz NOT NULL DEFAULT now(),
    -- hours first: what is rebuilt is an aggregate over some of the hours of a subject and meter
    PRIMARY KEY (subject, meter, hour_start, period_start)
) PARTITION BY RANGE (hour_start);
-- What no month was made for yet: nothing is ever refused for want of a partition.
CREATE TABLE ledger_hours_default PARTITION OF ledger_hours DEFAULT;

-- Makes the partition of a month if there is none, and moves into it what the default holds of it.
-- Returns whether it was made.
CREATE FUNCTION tallygate_add_hours_partition(month timestamptz) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    first timestamptz := date_trunc('month', month AT TIME ZONE 'UTC') AT TIME ZONE 'UTC';
    after timestamptz := (date_trunc('month', month AT TIME ZONE 'UTC') + interval '1 month')
                         AT TIME ZONE 'UTC';
    name  text := 'ledger_hours_' || to_char(month AT TIME ZONE 'UTC', 'YYYYMM');
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('tallygate_hours_partitions'));
    IF to_regclass(name) IS NOT NULL THEN
        RETURN false;
    END IF;
    -- The parent first, as everybody does: a query that had looked up its partitions before would
    -- find the rows neither here nor there. The default, as a row of this month that another session
    -- stores meanwhile would make ATTACH fail.
    LOCK TABLE ONLY ledger_hours IN ACCESS EXCLUSIVE MODE;
    LOCK TABLE ledger_hours_default IN ACCESS EXCLUSIVE MODE;
    -- Updates of one row are common and touch no index: free room keeps them on their page.
    EXECUTE format('CREATE TABLE %I (LIKE ledger_hours INCLUDING DEFAULTS INCLUDING CONSTRAINTS) '
                   'WITH (fillfactor = 70)', name);
    EXECUTE format('WITH moved AS (DELETE FROM ledger_hours_default '
                   'WHERE hour_start >= %L AND hour_start < %L RETURNING *) '
                   'INSERT INTO %I SELECT * FROM moved', first, after, name);
    EXECUTE format('ALTER TABLE ledger_hours ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                   name, first, after);
    RETURN true;
END $$;

-- Drops the partition of a month, whose hours were rolled up; returns whether there was one.
CREATE FUNCTION tallygate_drop_hours_partition(month timestamptz) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    name text := 'ledger_hours_' || to_char(month AT TIME ZONE 'UTC', 'YYYYMM');
BEGIN
    IF to_regclass(name) IS NULL THEN
        RETURN false;
    END IF;
    -- In the order in which everybody else locks them.
    LOCK TABLE ONLY ledger_hours IN ACCESS EXCLUSIVE MODE;
    EXECUTE format('DROP TABLE %I', name);
    RETURN true;
END $$;

SELECT tallygate_add_hours_partition(m)
FROM (SELECT DISTINCT date_trunc('month', hour_start AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' AS m
      FROM ledger_hours_flat
      UNION SELECT date_trunc('month', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'
      UNION SELECT (date_trunc('month', now() AT TIME ZONE 'UTC') + interval '1 month')
                   AT TIME ZONE 'UTC') months;
INSERT INTO ledger_hours (subject, meter, period_start, hour_start, total, overage, epoch, version,
                          updated_at)
SELECT subject, meter, period_start, hour_start, total, overage, epoch, version, updated_at
FROM ledger_hours_flat;
DROP TABLE ledger_hours_flat;

-- Months of hours that were rolled up: a day of a meter, split at period boundaries as hours are.
CREATE TABLE ledger_days (
    subject      text NOT NULL CHECK (subject <> ''),
    meter        text NOT NULL CHECK (meter <> ''),
    period_start timestamptz NOT NULL,
    day_start    timestamptz NOT NULL,
    total        numeric NOT NULL, -- the sum, the highest or the last of its hours, as the meter says
    overage      numeric NOT NULL,
    peak_hour    numeric NOT NULL, -- the highest total of an hour
    hours        integer NOT NULL, -- how many hours it was made of
    PRIMARY KEY (subject, meter, day_start, period_start)
);

-- Hours that start before `until` are in ledger_days and nowhere else: one row. An idle state may
-- store its last hour again when it wakes; below this bound that says nothing new.
CREATE TABLE ledger_rolled (
    single boolean PRIMARY KEY DEFAULT true CHECK (single),
    until  timestamptz NOT NULL
);
INSERT INTO ledger_rolled (until) VALUES (to_timestamp(0));

-- A period is sealed when it has ended and its last counts are here. A change after that unseals it.
ALTER TABLE ledger_periods
    ADD COLUMN sealed_at      timestamptz,
    ADD COLUMN seals          integer NOT NULL DEFAULT 0, -- how often: above 1, it changed late
    ADD COLUMN peak_hour      numeric,
    ADD COLUMN average_hour   numeric, -- over all hours of the period, idle ones included
    ADD COLUMN limit_quantity numeric, -- the lowest billing quota of the plan at its end
    ADD COLUMN limit_exceeded boolean,
    ADD COLUMN overage_charge numeric, -- overage times the plan's price of a unit, exact
    ADD COLUMN currency       text;
-- in the order in which they are sealed, page by page
CREATE INDEX ledger_periods_unsealed ON ledger_periods (period_end, subject, meter, period_start)
    WHERE sealed_at IS NULL;
DROP INDEX ledger_periods_end;
ALTER TABLE ledger_periods SET (fillfactor = 70);
ALTER TABLE ledger_subjects SET (fillfactor = 70);

-- One reset a limit and period, whatever became of the limit's height meanwhile.
DELETE FROM limit_events e USING limit_events f
WHERE e.kind = 'reset' AND f.kind = 'reset' AND e.id > f.id
  AND (e.subject, e.limit_name, e.period_start) = (f.subject, f.limit_name, f.period_start);
CREATE UNIQUE INDEX limit_events_reset ON limit_events (subject, limit_name, period_start)
    WHERE kind = 'reset';

-- Usage that was reported and not proxied: each with its own identity, counted once. Its quantity is
-- part of the totals of the hour in which it was counted.
CREATE TABLE usage_events (
    subject      text NOT NULL CHECK (subject <> ''),
    id           text NOT NULL CHECK (id <> ''),
    meter        text NOT NULL CHECK (meter <> ''),
    quantity     numeric NOT NULL CHECK (quantity NOT IN ('NaN', 'Infinity', '-Infinity')),
    occurred_at  timestamptz NOT NULL, -- as the reporter says
    counted_at   timestamptz NOT NULL, -- by Redis' clock
    period_start timestamptz NOT NULL, -- the billing period and hour it was counted in
    hour_start   timestamptz NOT NULL,
    metadata     jsonb,
    created_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (subject, id)
);
CREATE INDEX usage_events_hour ON usage_events (subject, meter, hour_start);
CREATE INDEX usage_events_time ON usage_events (subject, occurred_at DESC);

-- Background work that one process at a time does; taken over when its holder stops renewing.
CREATE TABLE leases (
    name       text PRIMARY KEY CHECK (name <> ''),
    holder     text NOT NULL,
    since      timestamptz NOT NULL,
    expires_at timestamptz NOT NULL
);
