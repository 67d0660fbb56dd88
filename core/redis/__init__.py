"""Redis access: the only package that imports a Redis driver.

`connection` is the thin pipelined connection of the hot path, `client` gives redis-py clients for
everything else, `scripts` loads the Lua files. May import `core.errors`, `core.clock` and `lua`.
"""
