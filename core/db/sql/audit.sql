-- Does the ledger agree with itself? Each query returns only what does not. Used by core/audit.

-- name: audit_subjects
-- The next subjects after $1 in order, $2 at most, in whichever table one has rows. A table with many
-- rows a subject is walked from subject to subject by its index, not read.
WITH RECURSIVE
p AS (
    (SELECT subject FROM ledger_periods WHERE subject > $1 ORDER BY subject LIMIT 1)
    UNION ALL
    SELECT (SELECT n.subject FROM ledger_periods n
            WHERE n.subject > p.subject ORDER BY n.subject LIMIT 1)
    FROM p WHERE p.subject IS NOT NULL
),
h AS (
    (SELECT subject FROM ledger_hours WHERE subject > $1 ORDER BY subject LIMIT 1)
    UNION ALL
    SELECT (SELECT n.subject FROM ledger_hours n
            WHERE n.subject > h.subject ORDER BY n.subject LIMIT 1)
    FROM h WHERE h.subject IS NOT NULL
),
d AS (
    (SELECT subject FROM ledger_days WHERE subject > $1 ORDER BY subject LIMIT 1)
    UNION ALL
    SELECT (SELECT n.subject FROM ledger_days n
            WHERE n.subject > d.subject ORDER BY n.subject LIMIT 1)
    FROM d WHERE d.subject IS NOT NULL
),
e AS (
    (SELECT subject FROM usage_events WHERE subject > $1 ORDER BY subject LIMIT 1)
    UNION ALL
    SELECT (SELECT n.subject FROM usage_events n
            WHERE n.subject > e.subject ORDER BY n.subject LIMIT 1)
    FROM e WHERE e.subject IS NOT NULL
)
SELECT subject FROM (
    (SELECT subject FROM ledger_subjects WHERE subject > $1 ORDER BY subject LIMIT $2)
    UNION (SELECT subject FROM p WHERE subject IS NOT NULL LIMIT $2)
    UNION (SELECT subject FROM h WHERE subject IS NOT NULL LIMIT $2)
    UNION (SELECT subject FROM d WHERE subject IS NOT NULL LIMIT $2)
    UNION (SELECT subject FROM e WHERE subject IS NOT NULL LIMIT $2)
) found
ORDER BY subject LIMIT $2;

-- name: audit_periods
-- Periods of subjects $1 that end after $2, and hours without one. What a period must be is what its
-- hours, and the days of months that were rolled up, come to: their sum, the highest or the last one.
WITH pieces AS (
    SELECT subject, meter, period_start, sum(total) AS total, sum(overage) AS overage,
           max(total) AS highest, max(at) AS latest,
           (array_agg(total ORDER BY at DESC) FILTER (WHERE total <> 0))[1] AS last
    FROM (
        SELECT subject, meter, period_start, hour_start AS at, total, overage
        FROM ledger_hours WHERE subject = ANY ($1::text[])
        UNION ALL
        SELECT subject, meter, period_start, day_start, total, overage
        FROM ledger_days WHERE subject = ANY ($1::text[])
    ) rows
    GROUP BY subject, meter, period_start
),
compared AS (
    SELECT subject, meter, period_start, m.aggregation,
           p.total, p.overage, p.sealed_at, p.updated_at, p.seals,
           p.period_end IS NULL AS orphan, s.subject IS NULL AS unknown,
           CASE m.aggregation WHEN 'max' THEN greatest(h.highest, 0)
                              WHEN 'last' THEN coalesce(h.last, 0)
                              ELSE coalesce(h.total, 0) END AS hours,
           -- of the highest or last value the overage depends on what the limit was at the time
           CASE WHEN m.aggregation IN ('max', 'last') THEN p.overage
                ELSE coalesce(h.overage, 0) END AS hours_overage
    FROM (SELECT * FROM ledger_periods WHERE subject = ANY ($1::text[])) p
    FULL JOIN pieces h USING (subject, meter, period_start)
    LEFT JOIN (SELECT subject FROM ledger_subjects WHERE subject = ANY ($1::text[])) s
        USING (subject)
    LEFT JOIN meters m ON m.name = meter
    WHERE coalesce(p.period_end, h.latest + interval '1 day') > $2
)
SELECT * FROM compared
WHERE orphan OR unknown OR total <> hours OR overage <> hours_overage OR total < 0
   OR sealed_at < updated_at OR seals > 1
ORDER BY subject, meter, period_start;

-- name: audit_events
-- Hours since $2 of subjects $1 in which usage events and the hour's total cannot both be right: more
-- than the total, unless refunds of an earlier hour may be part of it ($4), or less although nothing
-- but events is counted by the meter ($3). Where hours were rolled up, a day takes the place of its
-- hours. The last hour is not judged as too small: its events may be on their way.
WITH rolled AS (
    SELECT subject, meter, period_start, day_start, total FROM ledger_days
    WHERE subject = ANY ($1::text[])
),
events AS (
    SELECT e.subject, e.meter, e.period_start, coalesce(r.day_start, e.hour_start) AS slot,
           sum(e.quantity) AS quantity, count(*) AS events
    FROM usage_events e
    LEFT JOIN rolled r ON r.subject = e.subject AND r.meter = e.meter
        AND r.period_start = e.period_start
        AND r.day_start = date_trunc('day', e.hour_start, 'UTC')
    WHERE e.subject = ANY ($1::text[]) AND coalesce(r.day_start, e.hour_start) >= $2
    GROUP BY 1, 2, 3, 4
),
totals AS (
    SELECT subject, meter, period_start, slot, sum(total) AS total, bool_or(day) AS day
    FROM (
        SELECT h.subject, h.meter, h.period_start, coalesce(r.day_start, h.hour_start) AS slot,
               h.total, false AS day
        FROM ledger_hours h
        LEFT JOIN rolled r ON r.subject = h.subject AND r.meter = h.meter
            AND r.period_start = h.period_start
            AND r.day_start = date_trunc('day', h.hour_start, 'UTC')
        WHERE h.subject = ANY ($1::text[]) AND coalesce(r.day_start, h.hour_start) >= $2
        UNION ALL
        SELECT subject, meter, period_start, day_start, total, true FROM rolled
        WHERE day_start >= $2
    ) rows
    GROUP BY 1, 2, 3, 4
)
SELECT subject, meter, period_start, slot, coalesce(t.day, false) AS day,
       coalesce(e.quantity, 0) AS quantity, coalesce(e.events, 0)::int AS events,
       coalesce(t.total, 0) AS total
FROM events e FULL JOIN totals t USING (subject, meter, period_start, slot)
JOIN meters m ON m.name = meter AND m.aggregation = 'sum'
WHERE (e.quantity > coalesce(t.total, 0) AND NOT meter = ANY ($4::text[]))
   OR (meter = ANY ($3::text[]) AND coalesce(e.quantity, 0) < coalesce(t.total, 0)
       AND slot < now() - interval '70 minutes')
ORDER BY subject, meter, slot, period_start;

-- name: audit_these_periods
-- What the ledger has of periods that a live state holds, by position. Each is looked up by its key:
-- left to itself the planner reads the whole table for a few hundred.
SELECT t.position::int, l.total, l.overage
FROM unnest($1::text[], $2::text[], $3::timestamptz[])
    WITH ORDINALITY AS t (subject, meter, period_start, position)
CROSS JOIN LATERAL (
    SELECT total, overage FROM ledger_periods
    WHERE subject = t.subject AND meter = t.meter AND period_start = t.period_start
    LIMIT 1
) l;

-- name: audit_these_hours
-- The same of hours.
SELECT t.position::int, l.total, l.overage
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[])
    WITH ORDINALITY AS t (subject, meter, period_start, hour_start, position)
CROSS JOIN LATERAL (
    SELECT total, overage FROM ledger_hours
    WHERE subject = t.subject AND meter = t.meter AND hour_start = t.hour_start
      AND period_start = t.period_start
    LIMIT 1
) l;
