-- Gives a subject the state that the ledger knows, without ever lowering a live counter.
--
-- A subject without state (new, evicted, Redis wiped) receives all fields. One that has state keeps
-- each field it has, receives those it lacks, provided that it did not change since the caller
-- read it, and adopts the caller's epoch if that is higher: the ledger refuses states of a lower
-- epoch than its own, so a seed that lost a race must still pass its epoch on.
--
-- KEYS  1        state hash
-- ARGV  1        version that the caller saw, '' when there was no state
--       2        epoch the caller obtained from the ledger
--       3        version to start from when there is no state
--       4 ...    field, value pairs
-- Returns 1 when done, 0 when the state changed meanwhile: read again, retry.

local key = KEYS[1]
local version = redis.call('HGET', key, 'ver')
if not version then
  -- What the caller brings completes a state that is gone: alone it would start from zero.
  if ARGV[1] ~= '' then return 0 end
  local set = { 'epoch', ARGV[2], 'ver', ARGV[3] }
  for i = 4, #ARGV do set[#set + 1] = ARGV[i] end
  redis.call('HSET', key, unpack(set))
  return 1
end
local epoch = tonumber(redis.call('HGET', key, 'epoch') or '0')
if tonumber(ARGV[2]) > epoch then redis.call('HSET', key, 'epoch', ARGV[2]) end
if #ARGV < 4 then return 1 end
if version ~= ARGV[1] then return 0 end
for i = 4, #ARGV, 2 do
  -- a calendar counter is replaced: the caller found it behind its meter
  if string.sub(ARGV[i], 1, 2) == 'q:' then
    redis.call('HSET', key, ARGV[i], ARGV[i + 1])
  else
    redis.call('HSETNX', key, ARGV[i], ARGV[i + 1])
  end
end
return 1
