-- What the ledger knows of subjects whose live state is missing. Used by core/admission/ledger.py.

-- name: claim_epochs
-- A new epoch for each subject. The row lock makes a flush of an older state wait, and that flush
-- then finds a higher epoch and leaves the ledger alone: what is read after this claim is final.
INSERT INTO ledger_subjects AS l (subject, epoch, version, updated_at)
SELECT t.subject, 1, 0, now() FROM unnest($1::text[]) AS t (subject) ORDER BY t.subject
ON CONFLICT (subject) DO UPDATE SET epoch = l.epoch + 1, updated_at = now()
RETURNING subject, epoch, version;

-- name: read_epochs
-- `stored` is the highest epoch of which anything was stored: a claimed one may never have been used.
SELECT s.subject, s.epoch, s.version,
       (SELECT coalesce(max(p.epoch), 0) FROM ledger_periods p WHERE p.subject = s.subject) AS stored
FROM ledger_subjects s WHERE s.subject = ANY ($1::text[]);

-- name: consistent_read
-- First in a transaction: what follows sees one state of the ledger, whatever is flushed meanwhile.
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY;

-- name: keep_hours
-- Next, before the first query takes the snapshot: a month that is dropped after that would be
-- missing from its hours and its days alike.
LOCK TABLE ledger_hours IN ACCESS SHARE MODE;

-- name: latest_records
-- Each meter's latest period with its latest hour, also when it has ended, or begins only after the
-- present because Redis' clock is behind: the script rolls it over as it would have a live one.
-- `counted_at` is the hour (or day, where hours are gone) of the last count in any period: one may
-- have begun since without any.
SELECT p.subject, p.meter, p.period_start, p.period_end, p.total, p.overage,
       h.hour_start, h.total AS hour_total, h.overage AS hour_overage,
       coalesce(c.hour_start, d.day_start) AS counted_at
FROM (
    SELECT DISTINCT ON (subject, meter) *
    FROM ledger_periods
    WHERE subject = ANY ($1::text[])
    ORDER BY subject, meter, period_start DESC
) p
LEFT JOIN LATERAL (
    SELECT l.hour_start, l.total, l.overage
    FROM ledger_hours l
    WHERE l.subject = p.subject AND l.meter = p.meter AND l.period_start = p.period_start
      AND l.hour_start >= (SELECT until FROM ledger_rolled)
    ORDER BY l.hour_start DESC LIMIT 1
) h ON true
LEFT JOIN LATERAL (
    SELECT l.hour_start
    FROM ledger_hours l
    WHERE l.subject = p.subject AND l.meter = p.meter AND l.total <> 0
      AND l.hour_start >= (SELECT until FROM ledger_rolled)
    ORDER BY l.hour_start DESC LIMIT 1
) c ON true
LEFT JOIN LATERAL (
    SELECT l.day_start
    FROM ledger_days l
    WHERE l.subject = p.subject AND l.meter = p.meter AND l.total <> 0 AND c.hour_start IS NULL
    ORDER BY l.day_start DESC LIMIT 1
) d ON true;

-- name: span_totals
-- Aggregates over the hours that start in [from_hour, to_hour), by position in the arrays; a span
-- without hours is left out. Months that were rolled up answer with their days: of a calendar and
-- of a window of whole days they are the same. The last value is the last one that was counted: an
-- hour that a meter passed without a count says nothing.
SELECT t.position, s.total, s.highest, v.total AS last, v.start AS hour_start, v.period_start
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[])
    WITH ORDINALITY AS t (subject, meter, from_hour, to_hour, position)
CROSS JOIN LATERAL (
    SELECT sum(u.total) AS total, max(u.highest) AS highest
    FROM (
        SELECT sum(l.total) AS total, max(l.total) AS highest
        FROM ledger_hours l
        WHERE l.subject = t.subject AND l.meter = t.meter
          AND l.hour_start >= t.from_hour AND l.hour_start < t.to_hour
          AND l.hour_start >= (SELECT until FROM ledger_rolled)
        UNION ALL
        SELECT sum(d.total), max(d.peak_hour)
        FROM ledger_days d
        WHERE d.subject = t.subject AND d.meter = t.meter
          AND d.day_start >= t.from_hour AND d.day_start < t.to_hour
    ) u
) s
LEFT JOIN LATERAL (
    SELECT u.* FROM (
        (SELECT l.total, l.hour_start AS start, l.period_start
        FROM ledger_hours l
        WHERE l.subject = t.subject AND l.meter = t.meter
          AND l.hour_start >= t.from_hour AND l.hour_start < t.to_hour AND l.total > 0
          AND l.hour_start >= (SELECT until FROM ledger_rolled)
        ORDER BY l.hour_start DESC, l.period_start DESC LIMIT 1)
        UNION ALL
        (SELECT d.total, d.day_start, d.period_start
        FROM ledger_days d
        WHERE d.subject = t.subject AND d.meter = t.meter
          AND d.day_start >= t.from_hour AND d.day_start < t.to_hour AND d.total > 0
        ORDER BY d.day_start DESC, d.period_start DESC LIMIT 1)
    ) u
    ORDER BY u.start DESC, u.period_start DESC LIMIT 1
) v ON true
WHERE s.total IS NOT NULL;

-- name: these_hours
-- What the ledger has of hours that a live state holds too. The total of one that was rolled up is
-- null: the state had it flushed long before, so it is the state's own.
SELECT l.subject, l.meter, l.period_start, l.hour_start, l.total, l.overage
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[])
    AS t (subject, meter, period_start, hour_start)
JOIN ledger_hours l ON l.subject = t.subject AND l.meter = t.meter
    AND l.hour_start = t.hour_start AND l.period_start = t.period_start
WHERE l.hour_start >= (SELECT until FROM ledger_rolled)
UNION ALL
SELECT d.subject, d.meter, d.period_start, t.hour_start, NULL, NULL
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[])
    AS t (subject, meter, period_start, hour_start)
JOIN ledger_days d ON d.subject = t.subject AND d.meter = t.meter
    AND d.day_start = date_trunc('day', t.hour_start, 'UTC') AND d.period_start = t.period_start;

-- name: these_periods
-- What the ledger has of billing periods that are to be corrected.
SELECT l.subject, l.meter, l.period_start, l.period_end, l.total, l.overage
FROM unnest($1::text[], $2::text[], $3::timestamptz[]) AS t (subject, meter, period_start)
JOIN ledger_periods l ON l.subject = t.subject AND l.meter = t.meter
    AND l.period_start = t.period_start;

-- name: plans_of_subjects
SELECT id AS subject, plan FROM subscriptions WHERE id = ANY ($1::text[]);

-- name: thresholds_fired
-- For each limit the highest threshold of the latest period that has not ended, under the height
-- that the limit had last. 101 stands for "above the limit", as in core/admission/program.py.
SELECT DISTINCT ON (subject, limit_name)
       subject, limit_name, meter, period_start, limit_quantity,
       max(CASE kind WHEN 'exceeded' THEN 101 ELSE threshold END) AS highest
FROM limit_events
WHERE subject = ANY ($1::text[]) AND period_end > $2 AND kind <> 'reset'
GROUP BY subject, limit_name, meter, period_start, limit_quantity
ORDER BY subject, limit_name, period_start DESC, max(occurred_at) DESC, max(id) DESC;

-- name: pin_meters
INSERT INTO meters (name, decimals, aggregation)
SELECT * FROM unnest($1::text[], $2::int[], $3::text[])
ON CONFLICT (name) DO NOTHING;

-- name: read_meters
SELECT name, decimals, aggregation FROM meters;
