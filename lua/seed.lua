-- Gives a subject the state that the ledger knows, without ever lowering a live counter.
--
-- A subject without state (new, evicted, Redis wiped) receives all fields. One that has state keeps
-- each field it has, receives those it lacks, provided that it did not change since the caller
-- read it, and adopts the caller's epoch if that is higher: the ledger refuses states of a lower
-- epoch than its own, so a seed that lost a race must still pass its epoch on. A state that was found
-- to be older than the ledger, in a server that came back with older data, is replaced whole.
--
-- Whoever rebuilds a subject that has no state takes its claim before it reads the ledger, or leaves
-- one; those that read at once share it, and the first to write removes it. Without it the state was
-- seeded since, and is gone again: the reading may be out of date, and nothing is written.
--
-- KEYS  1        state hash
--       2        claim of the subject
--       3        sorted set of idle subjects of the shard
-- ARGV  1        version that the caller saw, '' when there was no state
--       2        epoch the caller obtained from the ledger
--       3        version to start from when there is no state
--       4        run of the server in which the state is now verified, '' to leave that as it is
--       5        '' or 'replace'
--       6        the caller's claim, '' without one
--       7 ...    field, value pairs
-- Returns 1 when done, 0 when the state or the claim changed meanwhile: read again, retry.

-- @include includes/clock.lua

local PAIRS = 7
local key, claim_key, idle_key, run = KEYS[1], KEYS[2], KEYS[3], ARGV[4]
local version = redis.call('HGET', key, 'ver')
-- another version: somebody was faster
local replaced = ARGV[5] == 'replace' and version == ARGV[1]
if not version or replaced then
  -- What the caller brings completes a state that is gone: alone it would start from zero.
  if not version and ARGV[1] ~= '' then return 0 end
  if not replaced and ARGV[6] ~= '' and redis.call('GET', claim_key) ~= ARGV[6] then return 0 end
  local set = { 'epoch', ARGV[2], 'ver', ARGV[3], 'run', run }
  for i = PAIRS, #ARGV do set[#set + 1] = ARGV[i] end
  if replaced then redis.call('DEL', key) end
  redis.call('HSET', key, unpack(set))
  redis.call('DEL', claim_key)
  -- one that is never admitted is never flushed: it leaves as any idle one does
  redis.call('ZADD', idle_key, 'NX', math.floor(now_micros() / 1000), key)
  return 1
end
local epoch = tonumber(redis.call('HGET', key, 'epoch') or '0')
if tonumber(ARGV[2]) > epoch then redis.call('HSET', key, 'epoch', ARGV[2]) end
if #ARGV < PAIRS and run == '' then return 1 end
if version ~= ARGV[1] or ARGV[5] == 'replace' then return 0 end
if run ~= '' then redis.call('HSET', key, 'run', run) end
for i = PAIRS, #ARGV, 2 do
  -- a calendar counter is replaced: the caller found it behind its meter
  if string.sub(ARGV[i], 1, 2) == 'q:' then
    redis.call('HSET', key, ARGV[i], ARGV[i + 1])
  else
    redis.call('HSETNX', key, ARGV[i], ARGV[i + 1])
  end
end
return 1
