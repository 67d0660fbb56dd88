-- Sealing of periods that have ended. Used by reconciler/periods.py.

-- name: unsealed_periods
-- Periods that ended by $1 and are not sealed, after the row ($2, $3, $4, $5), in the order of the
-- index on those; with the version that the ledger has of their subject.
SELECT p.subject, p.meter, p.period_start, p.period_end, s.version
FROM ledger_periods p JOIN ledger_subjects s ON s.subject = p.subject
WHERE p.sealed_at IS NULL AND p.period_end <= $1
  AND (p.period_end, p.subject, p.meter, p.period_start)
      > ($2::timestamptz, $3::text, $4::text, $5::timestamptz)
ORDER BY p.period_end, p.subject, p.meter, p.period_start
LIMIT $6;

-- name: oldest_unsealed
SELECT min(period_end) FROM ledger_periods WHERE sealed_at IS NULL;

-- name: lock_subjects
-- As a flush and a seeder lock them; those that one of them holds now are for the next round.
SELECT subject FROM ledger_subjects WHERE subject = ANY ($1::text[])
ORDER BY subject FOR NO KEY UPDATE SKIP LOCKED;

-- name: periods_to_seal
-- The given periods that are not sealed. `latest`: the meter has no later one. `peak_hour` is 0 when
-- no hour is above it. `average_hour` is over all hours from start to end, idle ones included; what
-- was rolled up into days has no hours to average a maximum or last value over: null.
SELECT p.subject, p.meter, p.period_start, p.period_end, p.total, p.overage,
       NOT EXISTS (SELECT FROM ledger_periods n
                   WHERE n.subject = p.subject AND n.meter = p.meter
                     AND n.period_start > p.period_start) AS latest,
       greatest(h.peak, d.peak, 0) AS peak_hour,
       CASE WHEN m.aggregation = 'sum' THEN p.total
            WHEN d.peak IS NULL THEN coalesce(h.total, 0) END * 3600
       / extract(epoch FROM p.period_end - p.period_start)::numeric AS average_hour
FROM unnest($1::text[], $2::text[], $3::timestamptz[]) AS t (subject, meter, period_start)
JOIN ledger_periods p ON p.subject = t.subject AND p.meter = t.meter
    AND p.period_start = t.period_start
LEFT JOIN meters m ON m.name = p.meter
CROSS JOIN LATERAL (
    SELECT max(l.total) AS peak, sum(l.total) AS total
    FROM ledger_hours l
    WHERE l.subject = p.subject AND l.meter = p.meter AND l.period_start = p.period_start
      AND l.hour_start > p.period_start - interval '1 hour' AND l.hour_start < p.period_end
      AND l.hour_start >= (SELECT until FROM ledger_rolled)
) h
CROSS JOIN LATERAL (
    SELECT max(l.peak_hour) AS peak
    FROM ledger_days l
    WHERE l.subject = p.subject AND l.meter = p.meter AND l.period_start = p.period_start
      AND l.day_start > p.period_start - interval '1 day' AND l.day_start < p.period_end
) d
WHERE p.sealed_at IS NULL;

-- name: seal_periods
UPDATE ledger_periods p
SET sealed_at = $1, seals = p.seals + 1, peak_hour = t.peak_hour,
    average_hour = coalesce(t.average_hour, p.average_hour), limit_quantity = t.limit_quantity,
    limit_exceeded = t.limit_exceeded, overage_charge = t.overage_charge, currency = t.currency
FROM unnest($2::text[], $3::text[], $4::timestamptz[], $5::numeric[], $6::numeric[], $7::numeric[],
            $8::boolean[], $9::numeric[], $10::text[])
    AS t (subject, meter, period_start, peak_hour, average_hour, limit_quantity, limit_exceeded,
          overage_charge, currency)
WHERE p.subject = t.subject AND p.meter = t.meter AND p.period_start = t.period_start
  AND p.sealed_at IS NULL
RETURNING p.seals;

-- name: start_periods
-- The periods that idle subjects are in, with nothing counted, as lua/roll.lua starts them for live
-- ones: so that the end of the one before is told once.
INSERT INTO ledger_periods
    (subject, meter, period_start, period_end, total, overage, epoch, version)
SELECT t.subject, t.meter, t.period_start, t.period_end, 0, 0, s.epoch, s.version
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[])
    AS t (subject, meter, period_start, period_end)
JOIN ledger_subjects s ON s.subject = t.subject
ON CONFLICT DO NOTHING;
