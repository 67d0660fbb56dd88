-- The demonstration data of `tallygate up --demo`: fixed identifiers, safe to repeat.

-- name: lock_demo
SELECT pg_advisory_xact_lock(7310310711111)

-- name: ensure_demo_creator
INSERT INTO creators (id, name, email) VALUES ($1, $2, $3) ON CONFLICT (id) DO NOTHING

-- name: ensure_demo_customer
INSERT INTO customers (id, creator_id, name, email) VALUES ($1, $2, $3, $4)
ON CONFLICT (id) DO NOTHING

-- name: ensure_demo_subscription
INSERT INTO subscriptions (id, creator_id, customer_id, plan, status)
VALUES ($1, $2, $3, $4, 'active')
ON CONFLICT (id) DO NOTHING

-- name: ensure_demo_key
INSERT INTO api_keys (id, subscription_id, name, prefix, digest) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (digest) DO NOTHING

-- name: delete_lost_demo_keys
-- keys whose secret nobody has any more
DELETE FROM api_keys WHERE subscription_id = $1 AND name = $2 AND digest <> $3
