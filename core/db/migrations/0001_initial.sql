-- Who may call (creators, customers, subscriptions, keys) and what they used (the ledger).
-- Identifiers are text with a type prefix (core/ids.py); times are timestamptz, in UTC.

CREATE TABLE creators (
    id         text PRIMARY KEY CHECK (id <> ''),
    name       text NOT NULL CHECK (name <> ''),
    email      text NOT NULL CHECK (email <> ''),
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE customers (
    id         text PRIMARY KEY CHECK (id <> ''),
    creator_id text NOT NULL REFERENCES creators (id),
    name       text NOT NULL CHECK (name <> ''),
    email      text NOT NULL CHECK (email <> ''),
    created_at timestamptz NOT NULL DEFAULT now(),
    -- the target of the composite reference below: a subscription's creator is its customer's
    UNIQUE (id, creator_id)
);
CREATE INDEX customers_creator ON customers (creator_id, id);

CREATE TABLE subscriptions (
    id          text PRIMARY KEY CHECK (id <> ''),
    creator_id  text NOT NULL REFERENCES creators (id),
    customer_id text NOT NULL,
    plan        text NOT NULL CHECK (plan <> ''),
    status      text NOT NULL
        CHECK (status IN ('trialing', 'active', 'past_due', 'paused', 'canceled')),
    -- billing periods are counted from here
    anchor      timestamptz NOT NULL DEFAULT now(),
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (customer_id, creator_id) REFERENCES customers (id, creator_id)
);
CREATE INDEX subscriptions_customer ON subscriptions (customer_id, id);
CREATE INDEX subscriptions_creator ON subscriptions (creator_id, id);

CREATE TABLE api_keys (
    id              text PRIMARY KEY CHECK (id <> ''),
    subscription_id text NOT NULL REFERENCES subscriptions (id),
    name            text NOT NULL,
    -- the first characters of the secret, for people to tell keys apart
    prefix          text NOT NULL,
    -- keyed BLAKE2b of the secret, which itself is kept nowhere
    digest          bytea NOT NULL UNIQUE CHECK (octet_length(digest) = 32),
    active          boolean NOT NULL DEFAULT true,
    expires_at      timestamptz,
    last_used_at    timestamptz,
    created_at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX api_keys_subscription ON api_keys (subscription_id, id);

-- The ledger. A subject is a subscription or, on keyless routes, a client address; so there is no
-- reference to subscriptions. Rows are absolute state, written in any order and any number of
-- times; so there are none among the ledger tables either. A refund may come an hour or a period
-- later than what it refunds, so a total may be below zero.

-- What a meter's counts are made of: fixed by its first use, kept when the configuration drops it.
CREATE TABLE meters (
    name        text PRIMARY KEY CHECK (name <> ''),
    decimals    integer NOT NULL CHECK (decimals >= 0),
    aggregation text NOT NULL CHECK (aggregation IN ('sum', 'max', 'last')),
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE ledger_subjects (
    subject    text PRIMARY KEY CHECK (subject <> ''),
    epoch      bigint NOT NULL,
    version    bigint NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE ledger_periods (
    subject      text NOT NULL CHECK (subject <> ''),
    meter        text NOT NULL CHECK (meter <> ''),
    period_start timestamptz NOT NULL,
    period_end   timestamptz NOT NULL,
    total        numeric NOT NULL CHECK (total NOT IN ('NaN', 'Infinity', '-Infinity')),
    overage      numeric NOT NULL DEFAULT 0
        CHECK (overage NOT IN ('NaN', 'Infinity', '-Infinity')),
    epoch        bigint NOT NULL,
    version      bigint NOT NULL,
    updated_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (subject, meter, period_start),
    CHECK (period_end > period_start)
);
CREATE INDEX ledger_periods_end ON ledger_periods (period_end);

CREATE TABLE ledger_hours (
    subject      text NOT NULL CHECK (subject <> ''),
    meter        text NOT NULL CHECK (meter <> ''),
    period_start timestamptz NOT NULL,
    hour_start   timestamptz NOT NULL,
    total        numeric NOT NULL CHECK (total NOT IN ('NaN', 'Infinity', '-Infinity')),
    overage      numeric NOT NULL DEFAULT 0
        CHECK (overage NOT IN ('NaN', 'Infinity', '-Infinity')),
    epoch        bigint NOT NULL,
    version      bigint NOT NULL,
    updated_at   timestamptz NOT NULL DEFAULT now(),
    -- hours first: what is rebuilt is an aggregate over some of the hours of a subject and meter
    PRIMARY KEY (subject, meter, hour_start, period_start)
);
CREATE INDEX ledger_hours_hour ON ledger_hours (hour_start);

CREATE TABLE limit_events (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    subject        text NOT NULL CHECK (subject <> ''),
    limit_name     text NOT NULL,
    meter          text NOT NULL,
    kind           text NOT NULL CHECK (kind IN ('warning', 'critical', 'exceeded', 'reset')),
    threshold      integer NOT NULL, -- whole percent
    usage          numeric NOT NULL,
    limit_quantity numeric NOT NULL,
    period_start   timestamptz NOT NULL,
    period_end     timestamptz NOT NULL,
    occurred_at    timestamptz NOT NULL,
    stream_id      text, -- the Redis stream entry that brought it
    created_at     timestamptz NOT NULL DEFAULT now(),
    -- once a period and height of the limit, however often the stream is read
    UNIQUE (subject, limit_name, period_start, kind, threshold, limit_quantity)
);
CREATE INDEX limit_events_subject_end ON limit_events (subject, period_end);
CREATE INDEX limit_events_subject_time ON limit_events (subject, occurred_at DESC);
CREATE INDEX limit_events_time ON limit_events (occurred_at);

-- Gateways cache keys and subscriptions, and LISTEN to `tallygate_changed`. Payloads:
-- `key:<hex digest>`, `subscription:<id>`, `all`. Sent at commit, so whoever reads afterwards sees
-- the change.

CREATE FUNCTION tallygate_key_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        PERFORM pg_notify('tallygate_changed', 'key:' || encode(OLD.digest, 'hex'));
    END IF;
    IF TG_OP <> 'DELETE' THEN
        -- an equal payload in one transaction is sent once
        PERFORM pg_notify('tallygate_changed', 'key:' || encode(NEW.digest, 'hex'));
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION tallygate_subscription_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        PERFORM pg_notify('tallygate_changed', 'subscription:' || OLD.id);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        PERFORM pg_notify('tallygate_changed', 'subscription:' || NEW.id);
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION tallygate_all_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('tallygate_changed', 'all');
    RETURN NULL;
END $$;

CREATE TRIGGER api_keys_inserted_or_deleted AFTER INSERT OR DELETE ON api_keys
    FOR EACH ROW EXECUTE FUNCTION tallygate_key_changed();
-- not last_used_at, which changes all the time, nor what only people read
CREATE TRIGGER api_keys_updated AFTER UPDATE ON api_keys
    FOR EACH ROW
    WHEN ((OLD.digest, OLD.active, OLD.expires_at, OLD.subscription_id)
          IS DISTINCT FROM (NEW.digest, NEW.active, NEW.expires_at, NEW.subscription_id))
    EXECUTE FUNCTION tallygate_key_changed();
CREATE TRIGGER api_keys_truncated AFTER TRUNCATE ON api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION tallygate_all_changed();

CREATE TRIGGER subscriptions_inserted_or_deleted AFTER INSERT OR DELETE ON subscriptions
    FOR EACH ROW EXECUTE FUNCTION tallygate_subscription_changed();
CREATE TRIGGER subscriptions_updated AFTER UPDATE ON subscriptions
    FOR EACH ROW
    WHEN ((OLD.id, OLD.creator_id, OLD.customer_id, OLD.plan, OLD.status, OLD.anchor)
          IS DISTINCT FROM
          (NEW.id, NEW.creator_id, NEW.customer_id, NEW.plan, NEW.status, NEW.anchor))
    EXECUTE FUNCTION tallygate_subscription_changed();
CREATE TRIGGER subscriptions_truncated AFTER TRUNCATE ON subscriptions
    FOR EACH STATEMENT EXECUTE FUNCTION tallygate_all_changed();
