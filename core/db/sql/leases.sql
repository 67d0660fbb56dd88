-- Named leases on background work. Postgres' clock decides; used by reconciler/lease.py.

-- name: acquire_lease
-- Takes or renews; no row when somebody else holds it. clock_timestamp() and not now(): the row may
-- have been locked by another process that took it meanwhile.
INSERT INTO leases AS l (name, holder, since, expires_at)
VALUES ($1, $2, clock_timestamp(), clock_timestamp() + $3::bigint * interval '1 ms')
ON CONFLICT (name) DO UPDATE
SET holder = excluded.holder,
    since = CASE WHEN l.holder = excluded.holder THEN l.since ELSE clock_timestamp() END,
    expires_at = clock_timestamp() + $3::bigint * interval '1 ms'
WHERE l.holder = excluded.holder OR l.expires_at <= clock_timestamp()
RETURNING holder;

-- name: release_lease
DELETE FROM leases WHERE name = $1 AND holder = $2;
