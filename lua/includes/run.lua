-- The run of this server, cut as core/redis/client.py does; '' where the user may not ask.
local function server_run()
  local info = redis.pcall('INFO', 'server')
  if type(info) ~= 'string' then return '' end
  return string.sub(string.match(info, 'run_id:(%x+)') or '', 1, 16)
end
