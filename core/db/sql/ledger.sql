-- The usage ledger. Written by the reconciler alone; read by everybody.

-- name: accept_states
-- Locks the subjects (in order, so that two flushes cannot deadlock) and returns those whose state
-- may be stored, with the version the ledger then has. A state of a lower epoch than the ledger's is
-- not among them: the ledger was read to seed a newer state meanwhile. Storing the same state again
-- changes nothing.
INSERT INTO ledger_subjects AS l (subject, epoch, version, updated_at)
SELECT t.subject, t.epoch, t.version, now()
FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS t (subject, epoch, version)
ORDER BY t.subject
ON CONFLICT (subject) DO UPDATE
SET epoch = excluded.epoch,
    version = CASE WHEN excluded.epoch > l.epoch THEN excluded.version
                   ELSE greatest(l.version, excluded.version) END,
    updated_at = excluded.updated_at
WHERE l.epoch <= excluded.epoch
RETURNING subject, version;

-- name: store_periods
-- Not taken, and not counted as touched, is a row that would lower a total within its epoch: Redis
-- lost writes and counted on from an older state. Only a meter of the last value may fall.
-- A sealed period whose amounts change is no longer sealed.
INSERT INTO ledger_periods AS l
    (subject, meter, period_start, period_end, total, overage, epoch, version, updated_at)
SELECT t.subject, t.meter, t.period_start, t.period_end, t.total, t.overage, t.epoch, t.version, now()
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[], $5::numeric[],
            $6::numeric[], $7::bigint[], $8::bigint[])
    AS t (subject, meter, period_start, period_end, total, overage, epoch, version)
ON CONFLICT (subject, meter, period_start) DO UPDATE
SET period_end = excluded.period_end, total = excluded.total, overage = excluded.overage,
    sealed_at = CASE WHEN (excluded.total, excluded.overage) = (l.total, l.overage)
                     THEN l.sealed_at END,
    epoch = excluded.epoch, version = excluded.version, updated_at = excluded.updated_at
WHERE (excluded.epoch, excluded.version) >= (l.epoch, l.version)
  AND (excluded.epoch > l.epoch OR excluded.total >= l.total
       OR NOT EXISTS (SELECT FROM meters m
                      WHERE m.name = excluded.meter AND m.aggregation <> 'last'));

-- name: store_hours
-- As store_periods.
INSERT INTO ledger_hours AS l
    (subject, meter, period_start, hour_start, total, overage, epoch, version, updated_at)
SELECT t.subject, t.meter, t.period_start, t.hour_start, t.total, t.overage, t.epoch, t.version, now()
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[], $5::numeric[],
            $6::numeric[], $7::bigint[], $8::bigint[])
    AS t (subject, meter, period_start, hour_start, total, overage, epoch, version)
ON CONFLICT (subject, meter, period_start, hour_start) DO UPDATE
SET total = excluded.total, overage = excluded.overage,
    epoch = excluded.epoch, version = excluded.version, updated_at = excluded.updated_at
WHERE (excluded.epoch, excluded.version) >= (l.epoch, l.version)
  AND (excluded.epoch > l.epoch OR excluded.total >= l.total
       OR NOT EXISTS (SELECT FROM meters m
                      WHERE m.name = excluded.meter AND m.aggregation <> 'last'));

-- name: store_events
-- Once per subject, limit, period, kind, threshold and height of the limit, and a reset once per
-- subject, limit and period, however often an event is delivered.
INSERT INTO limit_events
    (subject, limit_name, meter, kind, threshold, usage, limit_quantity, period_start, period_end,
     occurred_at, stream_id)
SELECT t.subject, t.limit_name, t.meter, t.kind, t.threshold, t.usage, t.limit_quantity,
       t.period_start, t.period_end, t.occurred_at, t.stream_id
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::int[], $6::numeric[],
            $7::numeric[], $8::timestamptz[], $9::timestamptz[], $10::timestamptz[], $11::text[])
    AS t (subject, limit_name, meter, kind, threshold, usage, limit_quantity, period_start,
          period_end, occurred_at, stream_id)
ON CONFLICT DO NOTHING
RETURNING subject, limit_name, kind, threshold;

-- name: ledger_of_subject
SELECT meter, period_start, period_end, total, overage, version, updated_at
FROM ledger_periods WHERE subject = $1
ORDER BY period_start DESC, meter LIMIT $2;

-- name: hours_of_subject
-- Where hours were rolled up, the days that overlap [$2, $3): `hour_start` is then the day's.
SELECT meter, period_start, hour_start, total, overage, false AS day
FROM ledger_hours
WHERE subject = $1 AND hour_start >= $2 AND hour_start < $3
  AND hour_start >= (SELECT until FROM ledger_rolled)
UNION ALL
SELECT meter, period_start, day_start, total, overage, true
FROM ledger_days
WHERE subject = $1 AND day_start > $2 - interval '1 day' AND day_start < $3
ORDER BY 3, 1, 2;

-- name: events_of_subject
SELECT limit_name, meter, kind, threshold, usage, limit_quantity, period_start, period_end, occurred_at
FROM limit_events WHERE subject = $1 AND occurred_at >= $2
ORDER BY occurred_at, id;
