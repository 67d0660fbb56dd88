-- Decides a batch of checks: every limit of each check, all or nothing, in order.
--
-- A check that one enforced limit refuses consumes nothing anywhere. An admitted check is counted
-- in its limits, its meters and their hours, marks the subject as changed, and appends the
-- thresholds it crossed to the event stream: one atomic step, durable together.
--
-- KEYS  1        sorted set of changed subjects of the shard
--       2        event stream of the shard
--       3        sorted set of reservations of the shard, by expiry
--       4        record of the caller's last batch
--       5        stream of usage events of the shard
--       6 ...    a check: the state hash, then one lease set for each concurrency limit, then, for a
--                usage event, the key that remembers its id
-- ARGV  1        number of programs, P
--       2..9     start and end of the current day, week, month, year (ms, UTC)
--       10       time in ms after which the caller no longer waits
--       11       run of the server in which states must have been verified against the ledger; '?' for
--                this one, from a caller whose connections may lead to another one any time; '' to
--                take any, where the user may not ask for it
--       12       number of the caller's batch: recorded with what was admitted, so that a caller that
--                never got the answer can learn it
--       13..12+P programs, JSON: see core/admission/program.py
--       then 4 a check: index of its program, start and end of the billing period, and the id of its
--                lease and reservation, or the text of its usage event, or, where the program has none
--                of these, how many times to check this
-- Returns a flat list of integers:
--       now in ms, then each time of a check: status (includes/status.lua), and for each limit of its program
--       flags, remaining (below zero when a quota is passed), ms until reset.
--       A check of another status than ADMIT and REJECT has its status alone: COLD (no state, or a
--       calendar counter is missing), STALE (outside the bounds given), LATE (nobody waits any
--       more), BROKEN (a field cannot be read), UNVERIFIED (the state may be older than the
--       ledger), DUPLICATE (a usage event that was counted). None of these counts anything.

-- @include includes/clock.lua
-- @include includes/run.lua
-- @include includes/status.lua
-- @include includes/rate.lua
-- @include includes/usage.lua
-- @include includes/thresholds.lua
-- @include includes/admitted.lua

local GCRA, FIXED, SLIDING, QUOTA, CONCURRENCY = 1, 2, 3, 4, 5
local BLOCK, OVERAGE_ACTION = 0, 2
local call, format = redis.call, string.format

local now_us = now_micros()
local now = math.floor(now_us / 1000)
local hour = now - now % HOUR
local hour_text = format(' %d', hour)
local dirty_key, events_key = KEYS[1], KEYS[2]
local run = ARGV[11] == '?' and server_run() or ARGV[11]
local program_count = tonumber(ARGV[1])
local calendar = {}
for i = 1, 8 do calendar[i] = tonumber(ARGV[i + 1]) end
local today = now >= calendar[1] and now < calendar[2]
-- A call that waited in a stalled server must not charge for requests that were answered 503.
local late = now > tonumber(ARGV[10])
local programs = {}

-- Subjects of this batch, by state key: read once, written once. `s[3i-2..3i]` is the state of
-- limit i: three numbers of a rate limit, or the leases held of a concurrency limit.
local subjects, order = {}, {}

local function open(key, key_at, program, from_text, to_text)
  local values = call('HMGET', key, unpack(program.fields))
  local durable = program.ttl == 0
  local s = { key = key, program = program, durable = durable }
  local from, to = tonumber(from_text), tonumber(to_text)
  if late then
    s.status = LATE
    return s
  end
  if not today or (durable and (now < from or now >= to)) then
    s.status = STALE
    return s
  end
  if durable then
    if not values[1] then
      s.status = COLD
      return s
    end
    if run ~= '' and values[2] ~= run then
      s.status = UNVERIFIED
      return s
    end
    s.version = tonumber(values[1])
    if program.event and call('EXISTS', KEYS[key_at + 1 + program.leases]) == 1 then
      s.status = DUPLICATE
      return s
    end
  end
  local meters, counters = {}, {}
  local expected = from_text .. ' ' .. to_text .. hour_text
  for i, row in ipairs(program.meters) do -- row: name, cost, aggregation, position
    meters[i] = open_meter(row[1], values[row[4]], values[row[4] + 1], expected, from, to, now)
  end
  for i, row in ipairs(program.calendars) do -- row: field, meter, kind, cost, aggregation, position
    local count = durable and meters[row[2]].count or 0
    local first = row[3] * 2
    local counter = open_calendar(values[row[6]], calendar[first - 1], calendar[first], count, durable)
    if not counter then
      s.status = COLD
      return s
    end
    counters[i] = counter
  end
  s.meters, s.counters = meters, counters
  local at, lease_at = 1, key_at
  for _, row in ipairs(program.limits) do
    local kind = row[1]
    if kind == GCRA then
      s[at], s[at + 1], s[at + 2] = gcra_open(row, values[row[8]], now_us)
    elseif kind == FIXED then
      s[at], s[at + 1], s[at + 2] = fixed_open(row, values[row[7]], now)
    elseif kind == SLIDING then
      s[at], s[at + 1], s[at + 2] = sliding_open(row, values[row[7]], now)
    elseif kind == CONCURRENCY then
      lease_at = lease_at + 1
      s[at] = call('ZCOUNT', KEYS[lease_at], '(' .. now, '+inf')
    end
    at = at + 3
  end
  return s
end

local set = {} -- scratch: field, text pairs of one HSET

local function close(s)
  if not s.changed then return end
  local program, n, at = s.program, 0, 1
  for _, row in ipairs(program.limits) do
    local kind = row[1]
    if kind == FIXED then
      set[n + 1], set[n + 2] = row[2], format('%d %d', s[at], s[at + 1])
      n = n + 2
    elseif kind <= SLIDING then
      set[n + 1], set[n + 2] = row[2], format('%d %d %d', s[at], s[at + 1], s[at + 2])
      n = n + 2
    end
    at = at + 3
  end
  for i, row in ipairs(program.meters) do
    local m = s.meters[i]
    set[n + 1] = 'm:' .. row[1]
    set[n + 2] = format('%d %d %d %d %d', m.total, m.over, m.hour_total, m.hour_over, m.count)
    n = n + 2
    if m.moved then
      set[n + 1], set[n + 2] = 'p:' .. row[1], format('%d %d %d', m.from, m.to, m.hour)
      n = n + 2
      for _, item in ipairs(m.closed or {}) do
        n = n + 1
        set[n] = item
      end
    end
  end
  for i, row in ipairs(program.calendars) do
    local c = s.counters[i]
    local count = s.durable and s.meters[row[2]].count or 0
    set[n + 1], set[n + 2] = row[1], format('%d %d %d', c.from, c.total, count)
    n = n + 2
  end
  for _, item in ipairs(s.reserved or {}) do
    n = n + 1
    set[n] = item
  end
  if s.durable then
    set[n + 1], set[n + 2] = 'ver', s.version
    n = n + 2
    call('ZADD', dirty_key, 'NX', now, s.key)
  end
  if n > 0 then
    call('HSET', s.key, unpack(set, 1, n))
    if not s.durable then call('PEXPIRE', s.key, program.ttl) end
  end
end

local due = {} -- expiry, member pairs of one ZADD

local reply, r = { now }, 1
local key_at, arg_at, last_arg = 6, 13 + program_count, #ARGV
local taken, taken_any = {}, false -- status of each check, for the record of the batch
-- scratch of one check, by limit
local flags, next_a, next_b, next_c = {}, {}, {}, {}
local left, left_after, wait, reset, over, used, caps = {}, {}, {}, {}, {}, {}, {}

while arg_at <= last_arg do
  local index = ARGV[arg_at]
  local program = programs[index]
  if not program then
    program = cjson.decode(ARGV[12 + index])
    programs[index] = program
  end
  local key = KEYS[key_at]
  local s = subjects[key]
  if not s or s.program ~= program then
    if s then close(s) end -- the same subject under another program: write, then read anew
    local ok
    ok, s = pcall(open, key, key_at, program, ARGV[arg_at + 1], ARGV[arg_at + 2])
    -- a state that cannot be read must not take the other subjects of the batch with it
    if not ok then s = { key = key, program = program, status = BROKEN } end
    if not subjects[key] then order[#order + 1] = key end
    subjects[key] = s
  end

  -- equal checks without leases come as one with a number of times
  local single = program.leases > 0 or program.reserve > 0 or program.event
  local times = single and 1 or tonumber(ARGV[arg_at + 3])
  for _ = 1, times do
    if s.status then
      r = r + 1
      reply[r] = s.status
      taken[#taken + 1] = s.status
    else
      local limits, meters, refused = program.limits, s.meters, false
      local at = 1
      for k = 1, #meters do over[k], caps[k] = 0, nil end
      for i = 1, #limits do
        local row = limits[i]
        local kind, full, flag = row[1], false, 0
        if kind == QUOTA then -- kind, field, enforce, limit, counter, action, meter index, ...
          local source, cost, aggregation
          local counter = row[5]
          if counter > 0 then
            source = meters[counter]
            cost, aggregation = program.meters[counter][2], program.meters[counter][3]
          else
            source = s.counters[-counter]
            cost, aggregation = program.calendars[-counter][4], program.calendars[-counter][5]
          end
          local limit, before = row[4], source.total
          local after = aggregate(aggregation, before, cost)
          left[i], left_after[i], used[i] = limit - before, limit - after, before
          local t = source.to - now
          wait[i], reset[i] = t, t
          local m = row[7]
          local billed = row[6] == OVERAGE_ACTION and row[3] == 1 and m > 0 -- a shadow quota bills nobody
          if billed and limit < (caps[m] or math.huge) then caps[m] = limit end
          if after > limit then
            if row[6] == BLOCK then
              full = true
            elseif row[6] == OVERAGE_ACTION then
              flag = OVERAGE
              local excess = before > limit and cost or after - limit
              if billed and over[m] < excess then over[m] = excess end
            else
              flag = WARNED
            end
          end
        elseif kind == GCRA then
          full, next_a[i], next_b[i], next_c[i], left[i], left_after[i], wait[i], reset[i] =
            gcra(row, s[at], s[at + 1], s[at + 2])
        elseif kind == FIXED then
          full, next_a[i], next_b[i], next_c[i], left[i], left_after[i], wait[i], reset[i] =
            fixed(row, s[at], s[at + 1], now)
        elseif kind == SLIDING then
          full, next_a[i], next_b[i], next_c[i], left[i], left_after[i], wait[i], reset[i] =
            sliding(row, s[at], s[at + 1], s[at + 2], now)
        else -- kind, name, enforce, limit, lease ms
          local held = s[at]
          full = held >= row[4]
          left[i] = held < row[4] and row[4] - held or 0
          left_after[i] = left[i] - 1
          -- when a slot will be given back is not known: ask again in a second
          wait[i], reset[i] = full and 1000 or 0, 0
          next_a[i] = held + 1
        end
        if full then
          flag = REFUSED
          if row[3] == 1 then refused = true end
        end
        flags[i] = flag
        at = at + 3
      end

      if refused then
        -- Nothing is consumed: an overage or a warning did not happen either.
        taken[#taken + 1] = REJECT
        reply[r + 1] = REJECT
        r = r + 1
        for i = 1, #limits do
          reply[r + 1] = flags[i] == REFUSED and REFUSED or 0
          reply[r + 2], reply[r + 3] = left[i], wait[i]
          r = r + 3
        end
      else
        taken[#taken + 1] = ADMIT
        reply[r + 1] = ADMIT
        r = r + 1
        s.changed = true
        taken_any = taken_any or s.durable
        if s.durable then s.version = s.version + 1 end
        for k = 1, #meters do
          local row = program.meters[k]
          charge(meters[k], row[3], row[2], over[k], caps[k])
        end
        if program.reserve > 0 then reserve(due, s, ARGV[arg_at + 3], caps, now) end
        if program.event then
          record_event(KEYS[5], s, KEYS[key_at + 1 + program.leases], ARGV[arg_at + 3], now)
          s.status = DUPLICATE -- were it in this batch again
        end
        for k = 1, #program.calendars do
          local row, c = program.calendars[k], s.counters[k]
          c.total = aggregate(row[5], c.total, row[4])
        end
        at = 1
        local lease_at = key_at
        for i = 1, #limits do
          local row, flag = limits[i], flags[i]
          local kind = row[1]
          reply[r + 1], reply[r + 2], reply[r + 3] = flag, left_after[i], reset[i]
          if kind == QUOTA then
            if s.durable and row[3] == 1 then -- a shadow quota tells nobody
              local source = row[5] > 0 and meters[row[5]] or s.counters[-row[5]]
              if source.previous and source.previous > 0 and not (s.reset and s.reset[i]) then
                s.reset = s.reset or {}
                s.reset[i] = true
                emit(events_key, key, row, 'reset', 0, source.previous, source.from, source.to, now)
              end
              local first = row[10][1]
              if first and source.total >= first[2] then
                s.fired = s.fired or {}
                s.fired[i] = cross(events_key, s.key, row, s.fired[i], used[i], source.total,
                  source.from, source.to, now)
              end
            end
          elseif flag == REFUSED then
            -- a shadow limit does not consume what it would have refused
            reply[r + 2], reply[r + 3] = left[i], wait[i]
            if kind == CONCURRENCY then lease_at = lease_at + 1 end
          elseif kind == CONCURRENCY then
            lease_at = lease_at + 1
            s[at] = next_a[i]
            call('ZADD', KEYS[lease_at], now + row[5], ARGV[arg_at + 3])
            -- a gateway that was killed never gives back the slots of a client that never returns
            if not s.durable then call('PEXPIRE', KEYS[lease_at], program.ttl) end
          else
            s[at], s[at + 1], s[at + 2] = next_a[i], next_b[i], next_c[i]
          end
          r = r + 3
          at = at + 3
        end
      end
    end
  end
  arg_at = arg_at + 4
  key_at = key_at + 1 + program.leases + (program.event and 1 or 0)
end

for i = 1, #order do close(subjects[order[i]]) end
if #due > 0 then call('ZADD', KEYS[3], unpack(due)) end
if taken_any then
  -- A day: far longer than a gateway takes to reconnect and ask.
  call('SET', KEYS[4], ARGV[12] .. ' ' .. now .. ' ' .. table.concat(taken), 'PX', 86400000)
end
return reply
