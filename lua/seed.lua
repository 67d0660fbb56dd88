-- Gives a subject the state that the ledger knows, without ever lowering a live counter.
--
-- A subject without state (new, evicted, Redis wiped) receives all fields. One that has state keeps
-- each field it has, receives those it lacks, provided that it did not change since the caller
-- read it, and adopts the caller's epoch if that is higher: the ledger refuses states of a lower
-- epoch than its own, so a seed that lost a race must still pass its epoch on. A state that was found
-- to be older than the ledger, in a server that came back with older data, is replaced whole.
--
-- KEYS  1        state hash
-- ARGV  1        version that the caller saw, '' when there was no state
--       2        epoch the caller obtained from the ledger
--       3        version to start from when there is no state
--       4        run of the server in which the state is now verified, '' to leave that as it is
--       5        '' or 'replace'
--       6 ...    field, value pairs
-- Returns 1 when done, 0 when the state changed meanwhile: read again, retry.

local key, run = KEYS[1], ARGV[4] or ''
local version = redis.call('HGET', key, 'ver')
-- another version: somebody was faster
local replaced = ARGV[5] == 'replace' and version == ARGV[1]
if not version or replaced then
  -- What the caller brings completes a state that is gone: alone it would start from zero.
  if not version and ARGV[1] ~= '' then return 0 end
  local set = { 'epoch', ARGV[2], 'ver', ARGV[3], 'run', run }
  for i = 6, #ARGV do set[#set + 1] = ARGV[i] end
  if replaced then redis.call('DEL', key) end
  redis.call('HSET', key, unpack(set))
  return 1
end
local epoch = tonumber(redis.call('HGET', key, 'epoch') or '0')
if tonumber(ARGV[2]) > epoch then redis.call('HSET', key, 'epoch', ARGV[2]) end
if #ARGV < 6 and run == '' then return 1 end
if version ~= ARGV[1] or ARGV[5] == 'replace' then return 0 end
if run ~= '' then redis.call('HSET', key, 'run', run) end
for i = 6, #ARGV, 2 do
  -- a calendar counter is replaced: the caller found it behind its meter
  if string.sub(ARGV[i], 1, 2) == 'q:' then
    redis.call('HSET', key, ARGV[i], ARGV[i + 1])
  else
    redis.call('HSETNX', key, ARGV[i], ARGV[i + 1])
  end
end
return 1
