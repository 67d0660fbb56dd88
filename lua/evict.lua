-- Takes subjects out of Redis that were idle for long: the ledger has all that their states count.
--
-- Kept is a subject that changed and was not flushed, that holds reservations (`v:<id>`) or their
-- tombstones (`x:<id>`), or that was flushed again since the caller listed it. A subject that comes
-- back is seeded from the ledger, as any that Redis does not know.
--
-- KEYS  1        sorted set of changed subjects of the shard
--       2        sorted set of idle subjects of the shard
--       3 ...    for each subject its state hash, then its lease sets
-- ARGV  1        time in ms: only what was idle before it
--       2        number of lease sets of each subject
-- Returns how many left, and how many are kept and still listed as idle before that time.

-- @include includes/clock.lua

local dirty_key, idle_key = KEYS[1], KEYS[2]
local before, leases = tonumber(ARGV[1]), tonumber(ARGV[2])
local now = math.floor(now_micros() / 1000)
local evicted, kept = 0, 0

local function is_held(key)
  for _, field in ipairs(redis.call('HKEYS', key)) do
    local kind = string.sub(field, 1, 2)
    if kind == 'v:' or kind == 'x:' then return true end
  end
  return false
end

for i = 3, #KEYS, 1 + leases do
  local key = KEYS[i]
  local since = tonumber(redis.call('ZSCORE', idle_key, key) or before)
  if since < before then
    if redis.call('ZSCORE', dirty_key, key) or is_held(key) then
      kept = kept + 1
    else
      evicted = evicted + redis.call('DEL', key)
      redis.call('ZREM', idle_key, key)
      for n = 1, leases do -- a set without members is gone; one with a request under way stays
        redis.call('ZREMRANGEBYSCORE', KEYS[i + n], '-inf', now)
      end
    end
  end
end
return { evicted, kept }
