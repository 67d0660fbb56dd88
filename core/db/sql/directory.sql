-- Creators, customers, subscriptions and keys: what core/directory runs.
-- Lists go page by page: rows after the identifier `after` ('' for the first page).

-- name: ping
SELECT 1

-- name: create_creator
INSERT INTO creators (id, name, email, created_at) VALUES ($1, $2, $3, $4)
RETURNING *

-- name: get_creator
SELECT * FROM creators WHERE id = $1

-- name: list_creators
SELECT * FROM creators WHERE id > $1 ORDER BY id LIMIT $2

-- name: create_customer
-- no row when the creator does not exist
INSERT INTO customers (id, creator_id, name, email, created_at)
SELECT $1, c.id, $3, $4, $5 FROM creators c WHERE c.id = $2
RETURNING *

-- name: get_customer
SELECT * FROM customers WHERE id = $1

-- name: list_customers
SELECT * FROM customers
WHERE id > $1 AND ($3::text IS NULL OR creator_id = $3)
ORDER BY id LIMIT $2

-- name: create_subscription
-- no row when the customer does not exist
INSERT INTO subscriptions
    (id, creator_id, customer_id, plan, status, anchor, created_at, updated_at)
SELECT $1, c.creator_id, c.id, $3, $4, $5, $6, $6 FROM customers c WHERE c.id = $2
RETURNING *

-- name: get_subscription
SELECT * FROM subscriptions WHERE id = $1

-- name: list_subscriptions
SELECT * FROM subscriptions
WHERE id > $1
  AND ($3::text IS NULL OR creator_id = $3)
  AND ($4::text IS NULL OR customer_id = $4)
ORDER BY id LIMIT $2

-- name: update_subscription
-- a null leaves the column as it is
UPDATE subscriptions
SET plan = coalesce($2::text, plan),
    status = coalesce($3::text, status),
    anchor = coalesce($4::timestamptz, anchor),
    updated_at = $5
WHERE id = $1
RETURNING *

-- name: create_key
-- no row when the subscription does not exist
INSERT INTO api_keys (id, subscription_id, name, prefix, digest, active, expires_at, created_at)
SELECT $1, s.id, $3, $4, $5, true, $6, $7 FROM subscriptions s WHERE s.id = $2
RETURNING *

-- name: get_key
SELECT * FROM api_keys WHERE id = $1

-- name: list_keys
SELECT * FROM api_keys
WHERE id > $1 AND ($3::text IS NULL OR subscription_id = $3)
ORDER BY id LIMIT $2

-- name: update_key
-- a null leaves the column as it is; $5 says whether expires_at becomes $4
UPDATE api_keys
SET name = coalesce($2::text, name),
    active = coalesce($3::boolean, active),
    expires_at = CASE WHEN $5::boolean THEN $4::timestamptz ELSE expires_at END
WHERE id = $1
RETURNING *

-- name: delete_key
DELETE FROM api_keys WHERE id = $1 RETURNING id

-- name: touch_keys
-- never backwards: several workers report the same key; locked in one order, against deadlocks
WITH used AS (
    SELECT * FROM unnest($1::bytea[], $2::timestamptz[]) AS u (digest, at)
), locked AS (
    SELECT k.id, used.at
    FROM api_keys k JOIN used ON used.digest = k.digest
    WHERE k.last_used_at IS NULL OR k.last_used_at < used.at
    ORDER BY k.id FOR NO KEY UPDATE OF k
)
UPDATE api_keys k SET last_used_at = locked.at FROM locked WHERE k.id = locked.id

-- name: lookup_keys
SELECT k.digest, k.active,
       coalesce(floor(extract(epoch FROM k.expires_at) * 1000), 0)::bigint AS expires_at_ms,
       s.id, s.plan, s.status,
       floor(extract(epoch FROM s.anchor) * 1000)::bigint AS anchor_ms,
       s.customer_id, s.creator_id
FROM api_keys k JOIN subscriptions s ON s.id = k.subscription_id
WHERE k.digest = ANY ($1::bytea[])

-- name: lookup_subscriptions
SELECT s.id, s.plan, s.status,
       floor(extract(epoch FROM s.anchor) * 1000)::bigint AS anchor_ms,
       s.customer_id, s.creator_id
FROM subscriptions s
WHERE s.id = ANY ($1::text[])
