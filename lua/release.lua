-- Releases or renews leases of concurrency limits, in a batch.
--
-- A lease that is not renewed expires by itself, so that a gateway that was killed gives its slots
-- back; a long request renews its own. Expired members are swept when a slot is given back.
--
-- KEYS  n        lease set of the n-th operation
-- ARGV  2n-1     lease id
--       2n       0 releases; above 0 renews for so many ms, unless the lease has expired
-- Returns the number of leases that were still held.

-- @include includes/clock.lua

local MARGIN = 60000
local now = math.floor(now_micros() / 1000)
local held = 0
for i, key in ipairs(KEYS) do
  local lease, ms = ARGV[i * 2 - 1], tonumber(ARGV[i * 2])
  if ms == 0 then
    held = held + redis.call('ZREM', key, lease)
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  elseif tonumber(redis.call('ZSCORE', key, lease) or 0) > now then
    redis.call('ZADD', key, 'XX', now + ms, lease)
    local ttl = redis.call('PTTL', key) -- keyless subjects have one: it must outlast the lease
    if ttl >= 0 and ttl < ms + MARGIN then redis.call('PEXPIRE', key, ms + MARGIN) end
    held = held + 1
  end
end
return held
