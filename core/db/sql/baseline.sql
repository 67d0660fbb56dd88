-- What the ledger knows of subjects whose live state is missing. Used by core/admission/baseline.py.

-- name: claim_epochs
-- A new epoch for each subject. The row lock makes a flush of an older state wait, and that flush
-- then finds a higher epoch and leaves the ledger alone: what is read after this claim is final.
INSERT INTO ledger_subjects AS l (subject, epoch, version, updated_at)
SELECT t.subject, 1, 0, now() FROM unnest($1::text[]) AS t (subject) ORDER BY t.subject
ON CONFLICT (subject) DO UPDATE SET epoch = l.epoch + 1, updated_at = now()
RETURNING subject, epoch, version;

-- name: read_epochs
SELECT subject, epoch, version FROM ledger_subjects WHERE subject = ANY ($1::text[]);

-- name: current_periods
SELECT subject, meter, period_start, period_end, total, overage
FROM ledger_periods
WHERE subject = ANY ($1::text[]) AND period_start <= $2 AND period_end > $2
ORDER BY subject, meter, period_start;

-- name: hours_since
-- Every counter that is rebuilt is an aggregate over a part of these.
SELECT subject, meter, period_start, hour_start, total, overage
FROM ledger_hours
WHERE subject = ANY ($1::text[]) AND hour_start >= $2
ORDER BY subject, meter, hour_start, period_start;

-- name: thresholds_fired
-- 101 stands for "above the limit", as in core/admission/program.py.
SELECT subject, limit_name, period_start,
       max(CASE kind WHEN 'exceeded' THEN 101 ELSE threshold END) AS highest
FROM limit_events
WHERE subject = ANY ($1::text[]) AND period_start <= $2 AND period_end > $2 AND kind <> 'reset'
GROUP BY subject, limit_name, period_start;
