-- Deletes a state that is older than the ledger, so that its next request is counted on from there.
--
-- Only the very state that was compared: one that changed or was repaired since stays.
--
-- KEYS  1        sorted set of changed subjects of the shard
--       2        state hash
-- ARGV  1        epoch that the caller saw
--       2        version that the caller saw
-- Returns 1 when it was deleted, 0 when it is another state by now.

local seen = redis.call('HMGET', KEYS[2], 'epoch', 'ver')
if seen[1] ~= ARGV[1] or seen[2] ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[2])
redis.call('ZREM', KEYS[1], KEYS[2])
return 1
