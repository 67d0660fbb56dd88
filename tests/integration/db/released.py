# ruff: noqa: E501 - word for word
"""The SQL that released versions run on the ledger and the directory, word for word.

A query that a release brings is added here when the next one changes the schema; none is edited.
"""

from __future__ import annotations

QUERIES: dict[str, str] = {
    "claim_epochs": """
INSERT INTO ledger_subjects AS l (subject, epoch, version, updated_at)
SELECT t.subject, 1, 0, now() FROM unnest($1::text[]) AS t (subject) ORDER BY t.subject
ON CONFLICT (subject) DO UPDATE SET epoch = l.epoch + 1, updated_at = now()
RETURNING subject, epoch, version
""",
    "read_epochs": """
SELECT subject, epoch, version FROM ledger_subjects WHERE subject = ANY ($1::text[])
""",
    "consistent_read": """
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY
""",
    "latest_records": """
SELECT p.subject, p.meter, p.period_start, p.period_end, p.total, p.overage,
       h.hour_start, h.total AS hour_total, h.overage AS hour_overage
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
    ORDER BY l.hour_start DESC LIMIT 1
) h ON true
""",
    "span_totals": """
SELECT t.position, s.total, s.highest, v.total AS last, v.hour_start, v.period_start
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[])
    WITH ORDINALITY AS t (subject, meter, from_hour, to_hour, position)
CROSS JOIN LATERAL (
    SELECT sum(l.total) AS total, max(l.total) AS highest
    FROM ledger_hours l
    WHERE l.subject = t.subject AND l.meter = t.meter
      AND l.hour_start >= t.from_hour AND l.hour_start < t.to_hour
) s
LEFT JOIN LATERAL (
    SELECT l.total, l.hour_start, l.period_start
    FROM ledger_hours l
    WHERE l.subject = t.subject AND l.meter = t.meter
      AND l.hour_start >= t.from_hour AND l.hour_start < t.to_hour AND l.total > 0
    ORDER BY l.hour_start DESC, l.period_start DESC LIMIT 1
) v ON true
WHERE s.total IS NOT NULL
""",
    "these_hours": """
SELECT l.subject, l.meter, l.period_start, l.hour_start, l.total
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[])
    AS t (subject, meter, period_start, hour_start)
JOIN ledger_hours l ON l.subject = t.subject AND l.meter = t.meter
    AND l.hour_start = t.hour_start AND l.period_start = t.period_start
""",
    "thresholds_fired": """
SELECT DISTINCT ON (subject, limit_name)
       subject, limit_name, meter, period_start, limit_quantity,
       max(CASE kind WHEN 'exceeded' THEN 101 ELSE threshold END) AS highest
FROM limit_events
WHERE subject = ANY ($1::text[]) AND period_end > $2 AND kind <> 'reset'
GROUP BY subject, limit_name, meter, period_start, limit_quantity
ORDER BY subject, limit_name, period_start DESC, max(occurred_at) DESC, max(id) DESC
""",
    "pin_meters": """
INSERT INTO meters (name, decimals, aggregation)
SELECT * FROM unnest($1::text[], $2::int[], $3::text[])
ON CONFLICT (name) DO NOTHING
""",
    "read_meters": """
SELECT name, decimals, aggregation FROM meters
""",
    "accept_states": """
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
RETURNING subject, version
""",
    "store_periods": """
INSERT INTO ledger_periods AS l
    (subject, meter, period_start, period_end, total, overage, epoch, version, updated_at)
SELECT t.subject, t.meter, t.period_start, t.period_end, t.total, t.overage, t.epoch, t.version, now()
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[], $5::numeric[],
            $6::numeric[], $7::bigint[], $8::bigint[])
    AS t (subject, meter, period_start, period_end, total, overage, epoch, version)
ON CONFLICT (subject, meter, period_start) DO UPDATE
SET period_end = excluded.period_end, total = excluded.total, overage = excluded.overage,
    epoch = excluded.epoch, version = excluded.version, updated_at = excluded.updated_at
WHERE (excluded.epoch, excluded.version) >= (l.epoch, l.version)
  AND (excluded.epoch > l.epoch OR excluded.total >= l.total
       OR NOT EXISTS (SELECT FROM meters m
                      WHERE m.name = excluded.meter AND m.aggregation <> 'last'))
""",
    "store_hours": """
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
                      WHERE m.name = excluded.meter AND m.aggregation <> 'last'))
""",
    "store_events": """
INSERT INTO limit_events
    (subject, limit_name, meter, kind, threshold, usage, limit_quantity, period_start, period_end,
     occurred_at, stream_id)
SELECT t.subject, t.limit_name, t.meter, t.kind, t.threshold, t.usage, t.limit_quantity,
       t.period_start, t.period_end, t.occurred_at, t.stream_id
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::int[], $6::numeric[],
            $7::numeric[], $8::timestamptz[], $9::timestamptz[], $10::timestamptz[], $11::text[])
    AS t (subject, limit_name, meter, kind, threshold, usage, limit_quantity, period_start,
          period_end, occurred_at, stream_id)
ON CONFLICT (subject, limit_name, period_start, kind, threshold, limit_quantity) DO NOTHING
RETURNING subject, limit_name, kind, threshold
""",
    "ledger_of_subject": """
SELECT meter, period_start, period_end, total, overage, version, updated_at
FROM ledger_periods WHERE subject = $1
ORDER BY period_start DESC, meter LIMIT $2
""",
    "hours_of_subject": """
SELECT meter, period_start, hour_start, total, overage
FROM ledger_hours WHERE subject = $1 AND hour_start >= $2 AND hour_start < $3
ORDER BY hour_start, meter, period_start
""",
    "events_of_subject": """
SELECT limit_name, meter, kind, threshold, usage, limit_quantity, period_start, period_end, occurred_at
FROM limit_events WHERE subject = $1 AND occurred_at >= $2
ORDER BY occurred_at, id
""",
    "ping": """
SELECT 1
""",
    "create_creator": """
INSERT INTO creators (id, name, email, created_at) VALUES ($1, $2, $3, $4)
RETURNING *
""",
    "get_creator": """
SELECT * FROM creators WHERE id = $1
""",
    "list_creators": """
SELECT * FROM creators WHERE id > $1 ORDER BY id LIMIT $2
""",
    "create_customer": """
INSERT INTO customers (id, creator_id, name, email, created_at)
SELECT $1, c.id, $3, $4, $5 FROM creators c WHERE c.id = $2
RETURNING *
""",
    "get_customer": """
SELECT * FROM customers WHERE id = $1
""",
    "list_customers": """
SELECT * FROM customers
WHERE id > $1 AND ($3::text IS NULL OR creator_id = $3)
ORDER BY id LIMIT $2
""",
    "create_subscription": """
INSERT INTO subscriptions
    (id, creator_id, customer_id, plan, status, anchor, created_at, updated_at)
SELECT $1, c.creator_id, c.id, $3, $4, $5, $6, $6 FROM customers c WHERE c.id = $2
RETURNING *
""",
    "get_subscription": """
SELECT * FROM subscriptions WHERE id = $1
""",
    "list_subscriptions": """
SELECT * FROM subscriptions
WHERE id > $1
  AND ($3::text IS NULL OR creator_id = $3)
  AND ($4::text IS NULL OR customer_id = $4)
ORDER BY id LIMIT $2
""",
    "update_subscription": """
UPDATE subscriptions
SET plan = coalesce($2::text, plan),
    status = coalesce($3::text, status),
    anchor = coalesce($4::timestamptz, anchor),
    updated_at = $5
WHERE id = $1
RETURNING *
""",
    "create_key": """
INSERT INTO api_keys (id, subscription_id, name, prefix, digest, active, expires_at, created_at)
SELECT $1, s.id, $3, $4, $5, true, $6, $7 FROM subscriptions s WHERE s.id = $2
RETURNING *
""",
    "get_key": """
SELECT * FROM api_keys WHERE id = $1
""",
    "list_keys": """
SELECT * FROM api_keys
WHERE id > $1 AND ($3::text IS NULL OR subscription_id = $3)
ORDER BY id LIMIT $2
""",
    "update_key": """
UPDATE api_keys
SET name = coalesce($2::text, name),
    active = coalesce($3::boolean, active),
    expires_at = CASE WHEN $5::boolean THEN $4::timestamptz ELSE expires_at END
WHERE id = $1
RETURNING *
""",
    "delete_key": """
DELETE FROM api_keys WHERE id = $1 RETURNING id
""",
    "touch_keys": """
WITH used AS (
    SELECT * FROM unnest($1::bytea[], $2::timestamptz[]) AS u (digest, at)
), locked AS (
    SELECT k.id, used.at
    FROM api_keys k JOIN used ON used.digest = k.digest
    WHERE k.last_used_at IS NULL OR k.last_used_at < used.at
    ORDER BY k.id FOR NO KEY UPDATE OF k
)
UPDATE api_keys k SET last_used_at = locked.at FROM locked WHERE k.id = locked.id
""",
    "lookup_keys": """
SELECT k.digest, k.active,
       coalesce(floor(extract(epoch FROM k.expires_at) * 1000), 0)::bigint AS expires_at_ms,
       s.id, s.plan, s.status,
       floor(extract(epoch FROM s.anchor) * 1000)::bigint AS anchor_ms,
       s.customer_id, s.creator_id
FROM api_keys k JOIN subscriptions s ON s.id = k.subscription_id
WHERE k.digest = ANY ($1::bytea[])
""",
    "lookup_subscriptions": """
SELECT s.id, s.plan, s.status,
       floor(extract(epoch FROM s.anchor) * 1000)::bigint AS anchor_ms,
       s.customer_id, s.creator_id
FROM subscriptions s
WHERE s.id = ANY ($1::text[])
""",
}
