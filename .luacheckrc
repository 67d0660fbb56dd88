-- Redis runs Lua 5.1 with these globals and no others.
std = "lua51"
read_globals = { "redis", "KEYS", "ARGV", "cjson", "cmsgpack", "struct", "bit" }
max_line_length = 110
-- An include brings functions that not every script uses.
ignore = { "211" }
