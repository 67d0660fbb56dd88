-- Marks states as flushed, after the ledger has committed them.
--
-- A subject that changed since its snapshot stays listed, as changed since then. Of its closed hours
-- and periods those are dropped that still are what the snapshot held: a late settlement changes
-- them. One that did not change is idle from now on, until it changes again: see evict.lua.
--
-- KEYS  1        sorted set of changed subjects of the shard
--       2        sorted set of idle subjects of the shard
--       3 ...    state hash of each flushed subject
-- ARGV  1        time of the snapshots, ms
--       then for each subject: epoch and version of its snapshot, number of strings that follow, and
--       the closed fields, each with its text
-- Returns the number of subjects that are clean now.

-- @include includes/clock.lua

local SLICE = 1000 -- Lua's stack holds 8000 values: months of hours, when Postgres was away
local dirty_key, idle_key = KEYS[1], KEYS[2]
local now = math.floor(now_micros() / 1000)
local clean, at = 0, 2

local function drop(key, first, last) -- field, text pairs in ARGV
  local names, stale = {}, {}
  for n = first, last, 2 do names[#names + 1] = ARGV[n] end
  for n, text in ipairs(redis.call('HMGET', key, unpack(names))) do
    if text == ARGV[first + 2 * n - 1] then stale[#stale + 1] = names[n] end
  end
  if #stale > 0 then redis.call('HDEL', key, unpack(stale)) end
end

for i = 3, #KEYS do
  local key = KEYS[i]
  local epoch, version, closed = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
  local state = redis.call('HMGET', key, 'epoch', 'ver')
  if state[1] == epoch then
    for first = at + 3, at + 2 + closed, SLICE do
      drop(key, first, math.min(first + SLICE - 1, at + 2 + closed))
    end
    if state[2] == version then
      redis.call('ZREM', dirty_key, key)
      redis.call('ZADD', idle_key, now, key)
      clean = clean + 1
    else
      redis.call('ZADD', dirty_key, 'XX', ARGV[1], key)
    end
  elseif not state[2] then
    redis.call('ZREM', dirty_key, key) -- the state is gone: nothing is left to flush
    redis.call('ZREM', idle_key, key)
    clean = clean + 1
  end
  at = at + 3 + closed
end
return clean
