-- What an admitted check leaves behind beside its counts: a reservation, or a usage event.

-- Remembers what a check charged until it is settled: `expiry admitted`, then for each meter its name,
-- the cost, start of period and hour, and where overage begins (-1: nowhere). A cost is `cost/keep` where
-- some of it stays charged when nobody settles it. `s.reserved` are field, text pairs of the state; `due`
-- expiry, member pairs of the shard's sorted set.
local function reserve(due, s, id, caps, now)
  local program = s.program
  local expiry = now + program.reserve
  local text = string.format('%d %d', expiry, now)
  for k, m in ipairs(s.meters) do
    local row = program.meters[k]
    local cost = string.format('%d', row[3] == 1 and row[2] or 0)
    local keep = program.keep and program.keep[k] or 0
    if keep > 0 then cost = string.format('%s/%d', cost, keep) end
    text = text .. string.format(' %s %s %d %d %d', row[1], cost, m.from, m.hour, caps[k] or -1)
  end
  s.reserved = s.reserved or {}
  local n = #s.reserved
  s.reserved[n + 1], s.reserved[n + 2] = 'v:' .. id, text
  due[#due + 1] = expiry
  due[#due + 1] = id .. ' ' .. s.key
end

-- Hands a counted usage event on to the reconciler, and remembers its id until that has stored it.
local function record_event(stream_key, s, event_key, text, now)
  local m, row = s.meters[1], s.program.meters[1]
  redis.call('SET', event_key, now)
  redis.call('XADD', stream_key, '*', 'key', s.key, 'meter', row[1], 'units', row[2], 'at', now,
    'start', m.from, 'hour', m.hour, 'event', text, 'memo', event_key)
end
