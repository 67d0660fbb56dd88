-- Usage events: reported, counted in Redis, and stored here once by subject and id.

-- name: store_usage_events
INSERT INTO usage_events
    (subject, id, meter, quantity, occurred_at, counted_at, period_start, hour_start, metadata)
SELECT t.subject, t.id, t.meter, t.quantity, t.occurred_at, t.counted_at, t.period_start,
       t.hour_start, t.metadata::jsonb
FROM unnest($1::text[], $2::text[], $3::text[], $4::numeric[], $5::timestamptz[],
            $6::timestamptz[], $7::timestamptz[], $8::timestamptz[], $9::text[])
    AS t (subject, id, meter, quantity, occurred_at, counted_at, period_start, hour_start, metadata)
ON CONFLICT (subject, id) DO NOTHING;

-- name: usage_event
SELECT id, meter, quantity, occurred_at, counted_at, metadata
FROM usage_events WHERE subject = $1 AND id = $2;
