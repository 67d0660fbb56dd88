-- Settles reservations and corrects totals after the fact, in a batch.
--
-- A reservation was counted when it was made. Confirming it only forgets it; refunding, expiring or
-- correcting it changes the totals of the period and hour it was counted in, however long ago that
-- was. One that expires is taken back, but for what it says is kept (lua/includes/admitted.lua);
-- progress raises that, and with it the totals once they hold less. What an expired one was is remembered
-- for a while, so that a settlement which comes late after all is counted again. An adjustment is not
-- bound to a reservation: it must come in a batch with a number, and is applied once however often the
-- batch is sent.
--
-- KEYS  1        sorted set of changed subjects of the shard
--       2        sorted set of reservations of the shard, by expiry
--       3        record of the numbered batches of this sender
--       4        event stream of the shard
--       5 ...    state hash of each operation
-- ARGV  1        run in which states must have been verified, '' to take any
--       2        number of this batch, growing from one batch of the sender to the next; '' for none
--       then for each operation: kind, id, and count of numbers that follow; kinds are
--         1 confirm: maybe the time in ms after which nobody waits for it; 2 refund, 3 expire, 5 cost,
--         each of the reservation `id`; 4 renew: ms; 6 adjust: no id; 7 progress: ms as renewed, and the
--         time after which nobody waits or 0. Of a cost and of progress follow: quotas to watch, JSON
--         rows of a program with 0 or the place of its calendar for a counter, or ''; start and end of
--         the current day, week, month, year in one text, or ''; and, a meter, its name and units: what
--         it cost, or what is kept of it. Of an adjustment follow, a meter: name, aggregation (1 sum,
--         2 max, 3 last), units, period start, period end, time it was counted, and limit above which it
--         is overage or ''.
-- Returns -1 when the numbered batch was applied before; else for each operation 1 done, 0 there is
--         no such reservation (any more), 2 COLD (state or closed hour or period is missing: restore it
--         from the ledger and send again), 4 LATE, 5 BROKEN (a field cannot be read), 6 UNVERIFIED. A
--         numbered batch is applied whole or, when an operation is COLD, BROKEN or UNVERIFIED, not at
--         all; its operations come in the order of their periods and times, so that none closes what
--         another needs. Should one fail all the same, it alone is left out: 8.

-- @include includes/clock.lua
-- @include includes/status.lua
-- @include includes/usage.lua
-- @include includes/thresholds.lua

local CONFIRM, REFUND, EXPIRE, RENEW, COST, ADJUST, PROGRESS = 1, 2, 3, 4, 5, 6, 7
local DONE, GONE, FAILED = 1, 0, 8
-- A month: a spool may wait that long on the disk of a dead host, also with the confirmation of a
-- reservation that expired meanwhile.
local RECORD_MS = 2592000000
local TOMBSTONE_MS = RECORD_MS
local KINDS = { 'day', 'week', 'month', 'year' }
local call, format = redis.call, string.format

local now = math.floor(now_micros() / 1000)
local run, number = ARGV[1], tonumber(ARGV[2])

if number then
  local last = tonumber(call('GET', KEYS[3]) or '0')
  if last >= number then return { -1 } end
end

-- Operations, read into tables before anything is changed.
local operations, at = {}, 3
for i = 5, #KEYS do
  local o = { key = KEYS[i], kind = tonumber(ARGV[at]), id = ARGV[at + 1], numbers = {} }
  local count = tonumber(ARGV[at + 2])
  for n = 1, count do o.numbers[n] = ARGV[at + 2 + n] end
  at = at + 3 + count
  operations[#operations + 1] = o
end

-- What a reservation's text says: expiry, time it was made, and for each meter its name, the cost and what
-- is kept of it, the period and hour it was counted in, and where overage begins.
local function parse(text)
  local items = {}
  for word in string.gmatch(text, '%S+') do items[#items + 1] = word end
  local meters = {}
  for n = 3, #items, 5 do
    local cost, keep = string.match(items[n + 1], '^(%d+)/?(%d*)$')
    local cap = tonumber(items[n + 4])
    meters[#meters + 1] = { name = items[n], cost = tonumber(cost), keep = tonumber(keep) or 0,
                            period = tonumber(items[n + 2]), hour = tonumber(items[n + 3]),
                            cap = cap >= 0 and cap or nil }
    assert(cost, 'unreadable reservation')
  end
  return tonumber(items[1]), tonumber(items[2]), meters
end

local function unparse(expiry, made, meters)
  local text = format('%d %d', expiry, made)
  for _, m in ipairs(meters) do
    local cost = m.keep > 0 and format('%d/%d', m.cost, m.keep) or format('%d', m.cost)
    text = text .. format(' %s %s %d %d %d', m.name, cost, m.period, m.hour, m.cap or -1)
  end
  return text
end

-- The units that a cost or progress names, by meter.
local function named(o)
  local units = {}
  for n = o.kind == COST and 3 or 5, #o.numbers, 2 do
    units[o.numbers[n]] = tonumber(o.numbers[n + 1])
  end
  return units
end

-- The changes an operation makes: {name, aggregation, units, period start, end, time, cap}.
local function changes(o)
  local list = {}
  if o.kind == ADJUST then
    for n = 1, #o.numbers, 7 do
      local function num(k) return tonumber(o.numbers[n + k]) end
      list[#list + 1] = { name = o.numbers[n], kind = num(1), units = num(2), from = num(3), to = num(4),
                          at = num(5), cap = num(6) }
    end
    return list
  end
  local expiry, made, meters = parse(o.text)
  local units = (o.kind == COST or o.kind == PROGRESS) and named(o) or {}
  for _, m in ipairs(meters) do
    local before = o.expired and m.keep or m.cost -- what the totals hold of it
    local after = m.cost
    if o.kind == REFUND then
      after = 0
    elseif o.kind == EXPIRE then
      after = m.keep
    elseif o.kind == COST then
      after = units[m.name] or m.cost
    elseif o.kind == PROGRESS then
      -- never less: a report that was held up must not take back what a later one said
      m.keep = math.max(m.keep, units[m.name] or 0)
      m.cost = math.max(m.cost, m.keep)
      after = o.expired and m.keep or m.cost
    end
    if after ~= before then
      list[#list + 1] = { name = m.name, kind = 1, units = after - before, from = m.period,
                          to = m.period + 1, at = math.max(made, m.hour), settles = true,
                          cap = m.cap }
    end
  end
  if o.kind == PROGRESS then
    if not o.expired then expiry = now + tonumber(o.numbers[1]) end
    o.expiry, o.text = expiry, unparse(expiry, made, meters)
  end
  return list
end

local function add(total, over, change, earlier)
  if change.kind == 3 and earlier then return total, 0 end -- a later value was counted since
  local after = change.kind == 1 and total + change.units or aggregate(change.kind, total, change.units)
  local excess = 0
  if change.units < 0 then
    if over > 0 then excess = -math.min(-change.units, over) end -- overage is given back first
  elseif change.cap and after > change.cap then
    excess = total > change.cap and after - total or after - change.cap
  end
  return after, excess
end

-- Whether a change finds what it changes. Nothing is changed.
local function possible(key, change)
  local meter = 'm:' .. change.name
  local bounds = call('HGET', key, 'p:' .. change.name)
  if not bounds then return false end
  local from, _, hour = string.match(bounds, '^(%d+) (%d+) (%d+)$')
  from, hour = tonumber(from), tonumber(hour)
  local its = change.at - change.at % HOUR
  local text = call('HGET', key, meter)
  if not text then return false end
  assert(from and string.match(text, '^(-?%d+) (-?%d+) (-?%d+) (-?%d+) (%d+)$'),
    'unreadable meter')
  if change.from > from and change.at >= from then return true end -- rolls on to it
  if change.from == from and its >= hour then return true end
  if call('HEXISTS', key, format('ch:%s:%d:%d', change.name, change.from, its)) == 0 then return false end
  return change.from == from or call('HEXISTS', key, format('cp:%s:%d', change.name, change.from)) == 1
end

local function apply(key, change)
  local name = change.name
  local p, m = 'p:' .. name, 'm:' .. name
  local its = change.at - change.at % HOUR
  local bounds = call('HGET', key, p)
  local from, _, hour = string.match(bounds, '^(%d+) (%d+) (%d+)$')
  from, hour = tonumber(from), tonumber(hour)
  local current = change.from == from and its == hour
  if change.from > from or (change.from == from and its > hour) then
    -- the first count of a later hour or period: close what was open
    local meter = open_meter(name, bounds, call('HGET', key, m), '', change.from, change.to, change.at)
    local set = { p, format('%d %d %d', meter.from, meter.to, meter.hour),
                  m, format('%d %d %d %d %d', meter.total, meter.over, meter.hour_total,
                            meter.hour_over, meter.count) }
    for _, item in ipairs(meter.closed or {}) do set[#set + 1] = item end
    call('HSET', key, unpack(set))
    current = true
  end
  local total, over, hour_total, hour_over, count =
    string.match(call('HGET', key, m), '^(-?%d+) (-?%d+) (-?%d+) (-?%d+) (%d+)$')
  total, over, count = tonumber(total), tonumber(over), tonumber(count)
  hour_total, hour_over = tonumber(hour_total), tonumber(hour_over)
  local hour_field, closed_hour, closed_hour_over = format('ch:%s:%d:%d', name, change.from, its)
  if not current then -- read before anything is written
    closed_hour, closed_hour_over = string.match(call('HGET', key, hour_field), '^(-?%d+) (-?%d+)$')
    closed_hour, closed_hour_over = tonumber(closed_hour), tonumber(closed_hour_over)
  end
  local excess
  if current or change.from == from then
    total, excess = add(total, over, change, not current)
    over = over + excess
  else
    local field = format('cp:%s:%d', name, change.from)
    local ends, closed, closed_over =
      string.match(call('HGET', key, field), '^(%d+) (-?%d+) (-?%d+)$')
    closed, closed_over = tonumber(closed), tonumber(closed_over)
    closed, excess = add(closed, closed_over, change)
    call('HSET', key, field, format('%d %d %d', tonumber(ends), closed, closed_over + excess))
  end
  if current then
    hour_total = change.kind == 1 and hour_total + change.units
      or aggregate(change.kind, hour_total, change.units)
    hour_over = hour_over + excess
  else
    closed_hour = change.kind == 1 and closed_hour + change.units
      or aggregate(change.kind, closed_hour, change.units)
    call('HSET', key, hour_field, format('%d %d', closed_hour, closed_hour_over + excess))
  end
  -- Calendar counters: a settlement of what they hold goes into them. Anything else leaves them behind
  -- their meter, upon which they are rebuilt from the ledger.
  if change.settles then
    for _, kind in ipairs(KINDS) do
      local field = 'q:' .. name .. ':' .. kind
      local text = call('HGET', key, field)
      if text then
        local start, sum, n = string.match(text, '^(%d+) (-?%d+) (%d+)$')
        if tonumber(n) == count then
          if tonumber(start) <= change.at then sum = tonumber(sum) + change.units end
          call('HSET', key, field, format('%d %d %d', tonumber(start), tonumber(sum), count + 1))
        end
      end
    end
  end
  call('HSET', key, m, format('%d %d %d %d %d', total, over, hour_total, hour_over, count + 1))
end

local watched = {} -- decoded rows by text

-- What `change` has made of the counter of a quota: its total, start and end; or nil when it was another
-- period's, of which nobody is warned any more.
local function counter(o, row, change, calendar)
  local name, kind = change.name, row[5]
  if kind == 0 then
    local from, to = string.match(call('HGET', o.key, 'p:' .. name), '^(%d+) (%d+) %d+$')
    local total = string.match(call('HGET', o.key, 'm:' .. name), '^(-?%d+) ')
    from = tonumber(from)
    if change.from == from then return tonumber(total), from, tonumber(to) end
    return nil
  end
  local from, total =
    string.match(call('HGET', o.key, 'q:' .. name .. ':' .. KINDS[kind]) or '', '^(%d+) (-?%d+) %d+$')
  from = tonumber(from)
  if from and from == calendar[kind * 2 - 1] and change.at >= from then
    return tonumber(total), from, calendar[kind * 2]
  end
  return nil
end

-- Fires the thresholds that a correction has passed: perhaps no request is admitted any more to do it.
local function watch(o, first)
  local text = o.numbers[first]
  if text == '' then return end
  watched[text] = watched[text] or cjson.decode(text)
  local calendar = {}
  for word in string.gmatch(o.numbers[first + 1], '%d+') do calendar[#calendar + 1] = tonumber(word) end
  for _, change in ipairs(o.list) do
    for _, row in ipairs(watched[text]) do
      if change.units > 0 and row[9] == change.name then
        local total, from, to = counter(o, row, change, calendar)
        if total and row[10][1] and total >= row[10][1][2] then
          cross(KEYS[4], o.key, row, nil, total - change.units, total, from, to, now)
        end
      end
    end
  end
end

-- Looks an operation up: the answer if there is nothing to change, or nil.
local function look_up(o)
  local known = call('HGET', o.key, 'run')
  if o.kind ~= ADJUST then
    o.text = call('HGET', o.key, 'v:' .. o.id)
    if not o.text then
      o.text = call('HGET', o.key, 'x:' .. o.id)
      o.expired = o.text and true
    end
    if not o.text then return GONE end
    -- a call that waited in a stalled server must not charge for an answer that was not served
    local deadline = o.kind == CONFIRM and o.numbers[1] or o.kind == PROGRESS and o.numbers[2]
    deadline = tonumber(deadline or '0')
    if deadline > 0 and now > deadline then return LATE end
  elseif redis.call('HEXISTS', o.key, 'ver') == 0 then
    return COLD
  end
  if run ~= '' and known ~= run then return UNVERIFIED end
  if o.kind == RENEW then
    if o.expired then return GONE end
    return nil
  end
  if o.kind == EXPIRE and o.expired then
    -- sent twice: what is remembered of it has its own time
    local until_ms = tonumber(call('ZSCORE', KEYS[2], o.id .. ' ' .. o.key) or '0')
    if until_ms > now then
      o.later = until_ms
      return nil
    end
  end
  if o.kind == EXPIRE and not o.expired then
    local expiry = parse(o.text)
    if expiry > now then
      o.later = expiry -- it was renewed meanwhile
      return nil
    end
  end
  o.list = changes(o)
  for _, change in ipairs(o.list) do
    if not (o.kind == EXPIRE and o.expired) and not possible(o.key, change) then return COLD end
  end
  return nil
end

local function settle(o)
  local member = o.id .. ' ' .. o.key
  if o.later then
    call('ZADD', KEYS[2], o.later, member)
    return
  end
  if o.kind == RENEW then
    local _, rest = string.match(o.text, '^(%d+) (.*)$')
    local expiry = now + tonumber(o.numbers[1])
    call('HSET', o.key, 'v:' .. o.id, format('%d %s', expiry, rest))
    call('ZADD', KEYS[2], expiry, member)
    return
  end
  if o.kind == EXPIRE and o.expired then -- nobody came
    call('HDEL', o.key, 'x:' .. o.id)
    call('ZREM', KEYS[2], member)
    return
  end
  for _, change in ipairs(o.list) do apply(o.key, change) end
  if o.kind == PROGRESS then
    call('HSET', o.key, (o.expired and 'x:' or 'v:') .. o.id, o.text)
    if not o.expired then call('ZADD', KEYS[2], o.expiry, member) end
  elseif o.kind ~= ADJUST then
    call('HDEL', o.key, (o.expired and 'x:' or 'v:') .. o.id)
    if o.kind == EXPIRE then
      call('HSET', o.key, 'x:' .. o.id, o.text)
      call('ZADD', KEYS[2], now + TOMBSTONE_MS, member)
    else
      call('ZREM', KEYS[2], member)
    end
  end
  if #o.list > 0 then
    call('HINCRBY', o.key, 'ver', 1)
    call('ZADD', KEYS[1], 'NX', now, o.key)
    if o.kind == COST then watch(o, 1) elseif o.kind == PROGRESS then watch(o, 3) end
  end
end

-- What cannot be read, or fails half-way, must not take the others with it: an error would undo
-- nothing, and the batch would come again.
local function checked(o)
  local ok, answer = pcall(look_up, o)
  if not ok then return BROKEN end
  return answer or DONE
end

local function done(o)
  return pcall(settle, o) and DONE or FAILED
end

local reply = {}
if number then
  for i, o in ipairs(operations) do
    reply[i] = checked(o)
    if reply[i] == COLD or reply[i] == UNVERIFIED or reply[i] == BROKEN then return reply end
  end
  for i, o in ipairs(operations) do
    if reply[i] == DONE then reply[i] = done(o) end
  end
  call('SET', KEYS[3], number, 'PX', RECORD_MS)
else
  for i, o in ipairs(operations) do
    reply[i] = checked(o)
    if reply[i] == DONE then reply[i] = done(o) end
    -- of a reservation that is gone nothing is left to expire
    if reply[i] == GONE and o.id ~= '' then call('ZREM', KEYS[2], o.id .. ' ' .. o.key) end
  end
end
return reply
