-- Rate limits: GCRA, fixed window, sliding window, on three numbers of state each.
--
-- `open` functions read the stored text (or false) into three numbers, rolled over to now. The
-- limit functions take the row of the program and those numbers, change nothing, and return
--   refused           true when the cost does not fit
--   a, b, c           the state, had the check been admitted
--   left, left_after  units remaining without and with the cost
--   wait, reset       ms until the cost fits (until whole, where it does), ms until whole after it

-- row: kind, field, enforce, cost, rate, period in us, burst
-- State: last us, backlog, period. The backlog is kept in 1/period of a unit, so that `rate` of
-- them drain in a microsecond and all arithmetic is on exact integers.
local function gcra_open(row, text, now_us)
  local period = row[6]
  if not text then return now_us, 0, period end
  local last, backlog, unit = string.match(text, '^(%d+) (%d+) (%d+)$')
  last, backlog, unit = tonumber(last), tonumber(backlog), tonumber(unit)
  if unit ~= period then
    -- The limit was changed: keep the backlog in units, rounded up so that none is given away.
    backlog = math.ceil(backlog * period / unit)
  end
  if now_us > last then
    backlog = backlog - (now_us - last) * row[5]
    if backlog < 0 then backlog = 0 end
  end
  -- Also when the server's clock stepped back: what is owed then drains from the new time on.
  return now_us, backlog, period
end

local function gcra(row, last, backlog, period)
  local rate, capacity = row[5], row[7] * period
  local after = backlog + row[4] * period
  local left, left_after = capacity - backlog, capacity - after
  local wait = backlog
  if left < 0 then left = 0 end -- the burst was lowered
  if left_after < 0 then left_after, wait = 0, after - capacity end
  return after > capacity, last, after, period,
    math.floor(left / period), math.floor(left_after / period),
    math.ceil(wait / (rate * 1000)), math.ceil(after / (rate * 1000))
end

-- row: kind, field, enforce, cost, limit, window in ms
-- State: window start, count.
local function fixed_open(row, text, now)
  local start = now - now % row[6]
  if not text then return start, 0, 0 end
  local s, count = string.match(text, '^(%d+) (%d+)$')
  s = tonumber(s)
  -- `>=` and not `==`: should the server's clock step back, the later window goes on. A start that
  -- is not aligned (the window's length was changed) counts while it lies within this window.
  if s >= start then return s - s % row[6], tonumber(count), 0 end
  return start, 0, 0
end

local function fixed(row, start, count, now)
  local limit, after = row[5], count + row[4]
  local left, left_after = limit - count, limit - after
  if left < 0 then left = 0 end
  if left_after < 0 then left_after = 0 end
  local reset = start + row[6] - now
  return after > limit, start, after, 0, left, left_after, reset, reset
end

-- row: kind, field, enforce, cost, limit, window in ms
-- State: window start, count, count of the window before.
local function sliding_open(row, text, now)
  local window = row[6]
  local start = now - now % window
  if not text then return start, 0, 0 end
  local s, count, before = string.match(text, '^(%d+) (%d+) (%d+)$')
  s, count = tonumber(s), tonumber(count)
  if s >= start then return s - s % window, count, tonumber(before) end
  if s + window >= start then return start, 0, count end
  return start, 0, 0
end

-- Two aligned buckets: the window before counts by the share of it that still overlaps. Compared
-- after multiplication with the window, so that no fraction is rounded.
local function sliding(row, start, count, before, now)
  local cost, limit, window = row[4], row[5], row[6]
  local elapsed = now - start
  if elapsed < 0 then elapsed = 0 end
  local weighted = before * (window - elapsed) + count * window
  local total = limit * window
  local after = weighted + cost * window
  local left, left_after = total - weighted, total - after
  local reset = start + window - now
  local wait = reset
  if left < 0 then left = 0 end
  if left_after < 0 then
    left_after = 0
    local room = limit - count - cost
    if room >= 0 then
      -- enough of the window before has to slide out within this window
      wait = math.ceil(window - room * window / before) - elapsed
    else
      -- this window's own count has to slide out during the next one
      room = limit - cost
      local next_elapsed = window
      if room >= 0 and count > 0 then next_elapsed = math.ceil(window - room * window / count) end
      if next_elapsed < 0 then next_elapsed = 0 end
      wait = window - elapsed + next_elapsed
    end
    if wait < 1 then wait = 1 end
  end
  return after > total, start, count + cost, before,
    math.floor(left / window), math.floor(left_after / window), wait, reset
end
