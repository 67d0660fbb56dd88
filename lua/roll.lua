-- Closes the billing periods of a subject that have ended, without waiting for its next check.
--
-- What it does to a meter is what the next check would do: the hour and the period become closed
-- fields, the next period starts with nothing counted, and the quotas of the plan are told that
-- they start over. Counts, calendars, rates and windows stay as they are. A period that has not
-- ended by the server's clock is left alone, and so is a state that the ledger is ahead of.
--
-- KEYS  1        sorted set of changed subjects of the shard
--       2        event stream of the shard
--       3        state hash
-- ARGV  1, 2     start and end of the subject's current billing period, ms; '' and '' closes nothing
--       3        version that the ledger has of the subject
--       4        number of ledger rows, N
--       then for each row: meter, start of its period in ms
--       then for each enforced billing quota of those meters: meter, limit, its height in units
-- Returns a list of integers:
--       status   0 done; 1 gone: no state, or one that is older than the ledger; 2 stale: outside of
--                the bounds given; 3 broken: a field cannot be read. Nothing is changed in 1 to 3.
--       closed   number of periods closed now
--       then for each row 1 when nothing of its period is here that the ledger lacks, else 0

-- @include includes/clock.lua
-- @include includes/usage.lua

local DONE, GONE, STALE, BROKEN = 0, 1, 2, 3
local call, format = redis.call, string.format
local dirty_key, events_key, key = KEYS[1], KEYS[2], KEYS[3]
local now = math.floor(now_micros() / 1000)
local from, to = tonumber(ARGV[1]), tonumber(ARGV[2])
local first_limit = 5 + 2 * tonumber(ARGV[4])

local function open()
  local version = tonumber(call('HGET', key, 'ver') or nil)
  if not version or version < tonumber(ARGV[3]) then return GONE end
  if from and (now < from or now >= to) then return STALE end
  local meters, seen = {}, {}
  for i = 5, first_limit - 1, 2 do
    local name = ARGV[i]
    local fields = from and not seen[name] and call('HMGET', key, 'p:' .. name, 'm:' .. name)
    seen[name] = true
    if fields and fields[1] and tonumber(string.match(fields[1], '^%d+ (%d+) %d+$')) <= now then
      meters[#meters + 1] = { name, open_meter(name, fields[1], fields[2], '', from, to, now) }
    end
  end
  return DONE, version, meters
end

local function tell(name, meter)
  for i = first_limit, #ARGV, 3 do
    if ARGV[i] == name then
      call('XADD', events_key, '*', 'key', key, 'limit', ARGV[i + 1], 'meter', name, 'kind', 'reset',
        'threshold', 0, 'used', format('%d', meter.previous), 'max', ARGV[i + 2],
        'start', format('%d', meter.from), 'end', format('%d', meter.to), 'at', format('%d', now))
    end
  end
end

-- a state that cannot be read must not take the other subjects of the round with it
local ok, status, version, meters = pcall(open)
if not ok then return { BROKEN } end
if status ~= DONE then return { status } end

local set, n = {}, 0
for _, item in ipairs(meters) do
  local name, m = item[1], item[2]
  set[n + 1], set[n + 2] = 'p:' .. name, format('%d %d %d', m.from, m.to, m.hour)
  set[n + 3], set[n + 4] = 'm:' .. name,
    format('%d %d %d %d %d', m.total, m.over, m.hour_total, m.hour_over, m.count)
  n = n + 4
  for _, text in ipairs(m.closed) do
    n = n + 1
    set[n] = text
  end
  if m.previous and m.previous > 0 then tell(name, m) end
end
if n > 0 then
  set[n + 1], set[n + 2] = 'ver', format('%d', version + 1)
  call('HSET', key, unpack(set, 1, n + 2))
  call('ZADD', dirty_key, 'NX', now, key)
end

local reply, r = { DONE, #meters }, 2
for i = 5, first_limit - 1, 2 do
  local fields = call('HMGET', key, 'p:' .. ARGV[i], 'cp:' .. ARGV[i] .. ':' .. ARGV[i + 1])
  local start = fields[1] and tonumber(string.match(fields[1], '^(%d+) '))
  local flushed = not fields[2]
  if flushed and start then
    local wanted = tonumber(ARGV[i + 1])
    -- the period is still open here: of a subscription that is gone, it stays so
    flushed = start > wanted or (start == wanted and not from and not call('ZSCORE', dirty_key, key))
  end
  r = r + 1
  reply[r] = flushed and 1 or 0
end
return reply
