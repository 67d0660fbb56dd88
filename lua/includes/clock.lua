-- Time of the Redis server: the only clock that decides a window.
-- Returns microseconds since the epoch. Tests replace this file to control time.
local function now_micros()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end
