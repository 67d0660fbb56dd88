-- Meter records and calendar counters: the state behind quotas and the ledger.
--
-- A meter has two fields. `p:<meter>` holds `start end hour`, the bounds of the billing period and
-- the start of the hour, and changes once an hour. `m:<meter>` holds `total overage hour_total
-- hour_overage count`, in smallest units, count being the number of updates.

local HOUR = 3600000

local function aggregate(kind, total, cost) -- kind: 1 sum, 2 max, 3 last
  if kind == 1 then return total + cost end
  if kind == 2 then return total > cost and total or cost end
  return cost
end

-- Opens a meter, rolled over to the hour of `now` and to the period [from, to). Changes nothing in Redis.
-- Returns a table whose `closed` holds field, text pairs that keep what was closed until flushed.
-- A record never goes back: neither when the server's clock does, nor when a caller still holds an
-- older billing anchor.
local function open_meter(name, bounds, text, expected, from, to, now)
  local hour = now - now % HOUR
  if not bounds then
    return { from = from, to = to, hour = hour, total = 0, over = 0,
             hour_total = 0, hour_over = 0, count = 0, moved = true }
  end
  local total, over, hour_total, hour_over, count =
    string.match(text, '^(-?%d+) (-?%d+) (-?%d+) (-?%d+) (%d+)$')
  assert(count, 'unreadable meter')
  total, over, count = tonumber(total), tonumber(over), tonumber(count)
  hour_total, hour_over = tonumber(hour_total), tonumber(hour_over)
  local meter = { from = from, to = to, hour = hour, total = total, over = over,
                  hour_total = hour_total, hour_over = hour_over, count = count }
  if bounds == expected then return meter end
  local ps, pe, hs = string.match(bounds, '^(%d+) (%d+) (%d+)$')
  ps, pe, hs = tonumber(ps), tonumber(pe), tonumber(hs)
  local closed = {}
  local ended = ps < from or pe <= now
  if ended then
    -- under another anchor or interval the caller's period may have begun before this one ended
    if ps >= from then meter.from = pe end
    closed[1] = 'cp:' .. name .. ':' .. ps
    closed[2] = string.format('%d %d %d', pe, total, over)
    meter.previous, meter.total, meter.over = total, 0, 0
  else
    meter.from, meter.to = ps, pe
  end
  if ended or hs < hour then
    closed[#closed + 1] = 'ch:' .. name .. ':' .. ps .. ':' .. hs
    closed[#closed + 1] = string.format('%d %d', hour_total, hour_over)
    meter.hour_total, meter.hour_over = 0, 0
  else
    meter.hour = hs
  end
  meter.closed, meter.moved = closed, true
  return meter
end

-- Counts a cost. `excess` is the part of it that is overage (sums), `cap` the limit above which the
-- meter's value is overage (max and last), or nil.
local function charge(meter, kind, cost, excess, cap)
  meter.total = aggregate(kind, meter.total, cost)
  meter.hour_total = aggregate(kind, meter.hour_total, cost)
  meter.count = meter.count + 1
  if kind == 1 then
    meter.over, meter.hour_over = meter.over + excess, meter.hour_over + excess
  elseif cap then
    meter.over = meter.total > cap and meter.total - cap or 0
    meter.hour_over = meter.hour_total > cap and meter.hour_total - cap or 0
  end
end

-- Opens a calendar counter: `start total count`, count being its meter's at the last update.
-- Returns nil when the meter moved on without this counter: it has to be rebuilt.
local function open_calendar(text, from, to, count, durable)
  if not text then
    if durable then return nil end
    return { from = from, to = to, total = 0 }
  end
  local s, total, n = string.match(text, '^(%d+) (-?%d+) (%d+)$')
  s, total = tonumber(s), tonumber(total)
  if durable and tonumber(n) ~= count then return nil end
  if s >= from then return { from = s, to = to, total = total } end
  return { from = from, to = to, total = 0, previous = total }
end
