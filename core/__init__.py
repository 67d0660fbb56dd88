"""What all three processes share: vocabulary (policy, period, keyspace), plumbing (config, redis,
db, telemetry). May import `lua` and libraries; never `gateway`, `control`, `reconciler` or `cli`.
"""
