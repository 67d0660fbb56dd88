-- Purpose: what a compact rate limit in nginx looks like: one INCR of the caller's counter of this
--   minute, and 429 above the location's $limit. No key check, one limit, no metering.
-- Runs in the access phase of ngx_http_lua; BENCH_REDIS_PORT and BENCH_REDIS_PASSWORD say where.

local socket = ngx.socket.tcp()
socket:settimeouts(1000, 1000, 1000)
local connected = socket:connect("127.0.0.1", tonumber(os.getenv("BENCH_REDIS_PORT")), { pool = "redis", pool_size = 512 })
if not connected then
  return ngx.exit(503)
end
if socket:getreusedtimes() == 0 then
  local password = os.getenv("BENCH_REDIS_PASSWORD")
  socket:send("*2\r\n$4\r\nAUTH\r\n$" .. #password .. "\r\n" .. password .. "\r\n")
  socket:receive("*l")
end

local counter = "n:" .. (ngx.var.http_authorization or "") .. ":" .. math.floor(ngx.time() / 60)
socket:send("*2\r\n$4\r\nINCR\r\n$" .. #counter .. "\r\n" .. counter .. "\r\n")
local line = socket:receive("*l")
local count = line and tonumber(line:sub(2))
if not count then
  return ngx.exit(503)
end
if count == 1 then -- once a minute and caller
  socket:send("*3\r\n$6\r\nEXPIRE\r\n$" .. #counter .. "\r\n" .. counter .. "\r\n$3\r\n120\r\n")
  socket:receive("*l")
end
socket:setkeepalive(60000, 512)
if count > tonumber(ngx.var.limit) then
  return ngx.exit(429)
end
