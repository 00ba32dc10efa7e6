-- What a tenant uses at the moment, and what it may. Read-only.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] tenant string
-- Returns {queued, delayed, running, tokens charged to its bucket (0 where no limit holds), max_queued, max_running,
--   tokens_per_minute}; of the limits 0 is none.
-- Refuses nothing.
--@include base

local tenant = ARGV[2]
local state = call('HMGET', Q .. 'tenant:' .. tenant, 'queued', 'delayed', 'running', 'bucket', 'bucket_at')
local rate, charged = tenant_limit('tokens_per_minute', tenant), 0
if rate > 0 and state[4] then
  local refilled = rate * math.max(0, now - num(state[5])) / 60000
  charged = math.ceil(rate - math.min(rate, tonumber(state[4]) + refilled))
end
return {
  num(state[1]), num(state[2]), num(state[3]), charged, tenant_limit('max_queued', tenant),
  tenant_limit('max_running', tenant), rate,
}
