-- Partitions of hours: made ahead, and old months rolled up into days. Used by
-- reconciler/retention.py.

-- name: lock_partitions
-- First in a transaction that changes partitions: one at a time. Everybody who reads or writes hours
-- queues behind a lock that is waited for, so not for long.
SELECT set_config('lock_timeout', '1s', true),
       pg_advisory_xact_lock(hashtext('tallygate_hours_partitions'));

-- name: steady_write
-- First in a transaction whose statements must see the same rows.
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ;

-- name: add_hours_partition
SELECT tallygate_add_hours_partition($1::timestamptz);

-- name: rolled_until
SELECT until FROM ledger_rolled;

-- name: months_without_partition
-- Months of which the default partition holds rows, but for those that were rolled up.
SELECT DISTINCT date_trunc('month', hour_start, 'UTC') AS month
FROM ledger_hours_default
WHERE hour_start >= (SELECT until FROM ledger_rolled)
ORDER BY month;

-- name: months_of_hours
-- The partitions, oldest first.
SELECT to_date(substring(c.relname FROM '\d{6}$'), 'YYYYMM')::timestamp AT TIME ZONE 'UTC' AS month
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = 'ledger_hours'::regclass AND c.relname ~ '^ledger_hours_\d{6}$'
ORDER BY month;

-- name: month_is_open
-- Whether a period that has hours in [$1, $2) is not sealed.
SELECT EXISTS (
    SELECT FROM ledger_periods
    WHERE sealed_at IS NULL AND period_end > $1 AND period_start < $2
);

-- name: roll_up_hours
-- Makes the days of [$1, $2). As the meter says: the sum, the highest, or the last hour that was
-- counted. A day that is there already keeps what it has: what comes after it is a repetition.
INSERT INTO ledger_days
    (subject, meter, period_start, day_start, total, overage, peak_hour, hours)
SELECT h.subject, h.meter, h.period_start, date_trunc('day', h.hour_start, 'UTC'),
       CASE m.aggregation
           WHEN 'max' THEN max(h.total)
           WHEN 'last' THEN coalesce(
               (array_agg(h.total ORDER BY h.hour_start DESC) FILTER (WHERE h.total > 0))[1], 0)
           ELSE sum(h.total) END,
       CASE m.aggregation
           WHEN 'max' THEN max(h.overage)
           WHEN 'last' THEN coalesce(
               (array_agg(h.overage ORDER BY h.hour_start DESC) FILTER (WHERE h.total > 0))[1], 0)
           ELSE sum(h.overage) END,
       max(h.total), count(*)
FROM ledger_hours h LEFT JOIN meters m ON m.name = h.meter
WHERE h.hour_start >= $1 AND h.hour_start < $2
GROUP BY h.subject, h.meter, h.period_start, date_trunc('day', h.hour_start, 'UTC'), m.aggregation
ON CONFLICT DO NOTHING;

-- name: rolled_up_to
-- Hours before $1 are in days from now on.
UPDATE ledger_rolled SET until = greatest(until, $1);

-- name: drop_hours_partition
SELECT tallygate_drop_hours_partition($1::timestamptz);

-- name: delete_rolled_hours
-- Hours of months that were rolled up before: repetitions, which only the default takes.
DELETE FROM ledger_hours_default WHERE hour_start < $1;
