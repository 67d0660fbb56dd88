-- The usage ledger. Written by the reconciler alone; read by everybody.

-- Numbers come as text, joined by spaces: the driver takes longer to pack an array of numbers, item
-- by item, than Postgres takes to split one. Quantities are in smallest units and times in ms.

-- name: accept_states
-- Locks the subjects (in order, so that two flushes cannot deadlock), takes over what is newer, and
-- returns those whose state must not be stored: with the ledger's version when that is higher, with
-- none when the ledger's epoch is higher, because it was read to seed a newer state meanwhile.
-- Storing the same state again changes nothing.
WITH given AS (
    SELECT * FROM unnest($1::text[], string_to_array($2, ' ')::bigint[],
                         string_to_array($3, ' ')::bigint[]) AS t (subject, epoch, version)
), taken AS (
    INSERT INTO ledger_subjects AS l (subject, epoch, version, updated_at)
    SELECT subject, epoch, version, now() FROM given ORDER BY subject
    ON CONFLICT (subject) DO UPDATE
    SET epoch = excluded.epoch,
        version = CASE WHEN excluded.epoch > l.epoch THEN excluded.version
                       ELSE greatest(l.version, excluded.version) END,
        updated_at = excluded.updated_at
    WHERE l.epoch <= excluded.epoch
    RETURNING subject, version
)
SELECT given.subject, taken.version
FROM given LEFT JOIN taken ON taken.subject = given.subject
WHERE taken.version IS DISTINCT FROM given.version;

-- name: store_periods
-- Epoch and version alone decide: within an epoch a total may fall, by a refund. What is equal is
-- not written again, so a subject that used one of its meters costs no rows of the others, but for
-- a higher epoch, which says whose counts these are (see read_epochs). A sealed period that does
-- change is open again. $9 and $10 are the meters' names and what a smallest unit of each is worth:
-- $2 counts into them from 1.
INSERT INTO ledger_periods AS l
    (subject, meter, period_start, period_end, total, overage, epoch, version, updated_at)
SELECT t.subject, ($9::text[])[t.meter],
       timestamptz 'epoch' + t.period_start * interval '1 millisecond',
       timestamptz 'epoch' + t.period_end * interval '1 millisecond',
       t.total * ($10::numeric[])[t.meter], t.overage * ($10::numeric[])[t.meter],
       t.epoch, t.version, now()
FROM unnest($1::text[], string_to_array($2, ' ')::int[], string_to_array($3, ' ')::bigint[],
            string_to_array($4, ' ')::bigint[], string_to_array($5, ' ')::bigint[],
            string_to_array($6, ' ')::bigint[], string_to_array($7, ' ')::bigint[],
            string_to_array($8, ' ')::bigint[])
    AS t (subject, meter, period_start, period_end, total, overage, epoch, version)
ON CONFLICT (subject, meter, period_start) DO UPDATE
SET period_end = excluded.period_end, total = excluded.total, overage = excluded.overage,
    epoch = excluded.epoch, version = excluded.version,
    updated_at = CASE WHEN (excluded.total, excluded.overage, excluded.period_end)
                           IS DISTINCT FROM (l.total, l.overage, l.period_end)
                      THEN excluded.updated_at ELSE l.updated_at END,
    sealed_at = CASE WHEN (excluded.total, excluded.overage, excluded.period_end)
                          IS DISTINCT FROM (l.total, l.overage, l.period_end)
                     THEN NULL ELSE l.sealed_at END
WHERE (excluded.epoch, excluded.version) >= (l.epoch, l.version)
  AND (excluded.total, excluded.overage, excluded.period_end, excluded.epoch)
      IS DISTINCT FROM (l.total, l.overage, l.period_end, l.epoch);

-- name: store_hours
-- As store_periods.
INSERT INTO ledger_hours AS l
    (subject, meter, period_start, hour_start, total, overage, epoch, version, updated_at)
SELECT t.subject, ($9::text[])[t.meter],
       timestamptz 'epoch' + t.period_start * interval '1 millisecond',
       timestamptz 'epoch' + t.hour_start * interval '1 millisecond',
       t.total * ($10::numeric[])[t.meter], t.overage * ($10::numeric[])[t.meter],
       t.epoch, t.version, now()
FROM unnest($1::text[], string_to_array($2, ' ')::int[], string_to_array($3, ' ')::bigint[],
            string_to_array($4, ' ')::bigint[], string_to_array($5, ' ')::bigint[],
            string_to_array($6, ' ')::bigint[], string_to_array($7, ' ')::bigint[],
            string_to_array($8, ' ')::bigint[])
    AS t (subject, meter, period_start, hour_start, total, overage, epoch, version)
ON CONFLICT (subject, meter, period_start, hour_start) DO UPDATE
SET total = excluded.total, overage = excluded.overage,
    epoch = excluded.epoch, version = excluded.version, updated_at = excluded.updated_at
WHERE (excluded.epoch, excluded.version) >= (l.epoch, l.version)
  AND (excluded.total, excluded.overage) IS DISTINCT FROM (l.total, l.overage);

-- name: store_events
-- Once per subject, limit, period, kind, threshold and height of the limit, however often an event
-- is delivered; a reset once per period whatever the height.
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
