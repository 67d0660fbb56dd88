-- Thresholds of quotas: each fires once a period, as an event of the shard's stream.
--
-- A row is a quota's of a program (core/admission/program.py); its row[10] is {percent, units from which it
-- fires, kind}, ascending; 101 stands for "above the limit".

-- Appends one event. `used` is in smallest units of the meter, as is the limit.
local function emit(stream_key, key, row, kind, threshold, used, from, to, at)
  redis.call('XADD', stream_key, '*', 'key', key, 'limit', row[8], 'meter', row[9], 'kind', kind,
    'threshold', threshold, 'used', used, 'max', row[4], 'start', from, 'end', to, 'at', at)
end

-- Fires what `used` has reached in this period and was not fired yet. `fired` is the highest that was, nil
-- to look it up. Under another limit than the one it fired for, what had been used `before` counts as
-- fired. Returns the highest that is fired now.
local function cross(stream_key, key, row, fired, before, used, from, to, at)
  if not fired then
    fired = 0
    local start, percent, limit =
      string.match(redis.call('HGET', key, row[2]) or '', '^(%d+) (%d+) (%d+)$')
    if tonumber(start) == from then
      if tonumber(limit) == row[4] then
        fired = tonumber(percent)
      else
        for _, threshold in ipairs(row[10]) do
          if before >= threshold[2] then fired = threshold[1] end
        end
      end
    end
  end
  local highest = fired
  for _, threshold in ipairs(row[10]) do
    if threshold[1] > fired and used >= threshold[2] then
      highest = threshold[1]
      emit(stream_key, key, row, threshold[3], highest, used, from, to, at)
    end
  end
  if highest > fired then
    redis.call('HSET', key, row[2], string.format('%d %d %d', from, highest, row[4]))
  end
  return highest
end
