-- Remember the spans of running attempts, so that the spans of later attempts can link to them.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] worker string; then per hold: id string; attempt int; traceparent string
-- Returns per hold 'ok' or 'fenced'. Writes `trace`: the submitter's context, a space, the latest attempt's.
-- Refuses a stale owner or attempt: 'fenced', and counted.
--@include base waiting jobs

local worker, replies = ARGV[2], {}
for at = 3, #ARGV, 3 do
  local id, attempt = ARGV[at], ARGV[at + 1]
  local job = call('HMGET', Q .. 'job:' .. id, 'state', 'owner', 'attempt', 'trace')
  if job[1] == 'running' and job[2] == worker and job[3] == attempt then
    local submitter = string.match(job[4] or '', '^%S*')
    call('HSET', Q .. 'job:' .. id, 'trace', submitter .. ' ' .. ARGV[at + 2])
    replies[#replies + 1] = 'ok'
  else
    replies[#replies + 1] = fence(id, worker, attempt)
  end
end
flush()
return replies
