-- What `tallygate doctor` asks of Postgres. Every role may run these.

-- name: doctor_settings
SELECT current_setting('server_version') AS version,
       current_setting('fsync') AS fsync,
       current_setting('synchronous_commit') AS synchronous_commit,
       current_setting('full_page_writes') AS full_page_writes,
       current_setting('synchronous_standby_names') AS synchronous_standby_names,
       current_setting('default_transaction_read_only') AS read_only,
       current_setting('data_checksums') AS data_checksums,
       current_setting('max_connections')::int AS max_connections,
       current_setting('superuser_reserved_connections')::int
           + coalesce(current_setting('reserved_connections', true)::int, 0) AS reserved,
       pg_is_in_recovery() AS standby,
       (SELECT count(*) FROM pg_stat_replication)::int AS standbys,
       (SELECT coalesce(sum(numbackends), 0) FROM pg_stat_database)::int AS sessions;

-- name: has_migrations
SELECT to_regclass('schema_migrations') IS NOT NULL;

-- name: read_migrations
SELECT version, name FROM schema_migrations ORDER BY version;
