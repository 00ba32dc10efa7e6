-- A worker's sign of life: prolong its leases, store its heartbeat and record, and tell it what to stop.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] worker string; ARGV[3] lease_ms int; ARGV[4] record bytes ('' leaves the stored one); then per hold:
--   id string; attempt int
-- Returns per hold 'ok', 'cancelled' or 'expired' (stop and finish it so), or 'fenced'.
-- Refuses to prolong what another attempt or nobody runs: 'fenced', and counted.
--@include base waiting jobs

local worker, lease_until = ARGV[2], now + tonumber(ARGV[3])
call('ZADD', Q .. 'heartbeats', now, worker)
if ARGV[4] ~= '' then
  call('HSET', Q .. 'workers', worker, ARGV[4])
end

local replies = {}
for at = 5, #ARGV, 2 do
  local id, attempt = ARGV[at], ARGV[at + 1]
  local job = call('HMGET', Q .. 'job:' .. id, 'state', 'owner', 'attempt', 'cancel', 'deadline')
  local reply = 'fenced'
  if job[1] == 'running' and job[2] == worker and job[3] == attempt then
    call('ZADD', Q .. 'leases', 'XX', lease_until, id)
    reply = verdict(job[4], job[5])
  else
    fence(id, worker, attempt)
  end
  replies[#replies + 1] = reply
end
flush()
return replies
