-- What an operator wants to see of a queue, at one moment. Read-only.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] max_tenants int: per priority, lines are given for at most so many tenants, the longest waiting first
-- Returns {now_ms, stats flat list, {priority, tenant, depth, oldest_ms, ...}, running, delayed, dead,
--   {worker, heartbeat_ms, record, ...}}.
-- Refuses nothing.
--@include base

local lines = {}
for p = 9, 0, -1 do
  local heads = call('ZRANGE', Q .. 'heads:' .. p, 0, tonumber(ARGV[2]) - 1, 'WITHSCORES')
  for i = 1, #heads, 2 do
    local suffix = p .. ':' .. heads[i]
    lines[#lines + 1] = p
    lines[#lines + 1] = heads[i]
    lines[#lines + 1] = call('XLEN', Q .. 'ready:' .. suffix) + call('XLEN', Q .. 'resume:' .. suffix)
    lines[#lines + 1] = tonumber(heads[i + 1])
  end
end
local workers, beats = {}, call('ZRANGE', Q .. 'heartbeats', 0, -1, 'WITHSCORES')
for i = 1, #beats, 2 do
  workers[#workers + 1] = beats[i]
  workers[#workers + 1] = tonumber(beats[i + 1])
  workers[#workers + 1] = call('HGET', Q .. 'workers', beats[i]) or ''
end
return {
  now, call('HGETALL', Q .. 'stats'), lines, call('ZCARD', Q .. 'leases'), call('ZCARD', Q .. 'delayed'),
  call('XLEN', Q .. 'dead'), workers,
}
