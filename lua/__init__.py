"""The Redis scripts, as package data: one verb a file, shared pieces in `includes/`.

Every file opens with its purpose, KEYS, ARGV and Returns. `core.redis.scripts` loads them,
resolves `-- @include` lines and checks arity; no script builds a key. Imports nothing.
"""
