-- The status of jobs. Read-only.
--
-- KEYS[1] prefix; ARGV[1] now_ms (unused by reads of the clock); then job ids
-- Returns per job an empty list (no such job), or its fields in the order of FIELDS, the last being the terminal record
--   where the job ended otherwise than completed.
-- Refuses nothing.
--@include base

local FIELDS = {
  'state', 'priority', 'tenant', 'attempt', 'crashes', 'errors', 'owner', 'submitted', 'enqueued', 'started', 'finished',
  'deadline', 'tokens', 'metadata', 'error_code', 'error_message', 'cancel', 'trace', 'losses',
}
local replies = {}
for at = 2, #ARGV do
  local key = Q .. 'job:' .. ARGV[at]
  local job = call('HMGET', key, unpack(FIELDS))
  if not job[1] then
    job = {}
  else
    for i = 1, #FIELDS do
      job[i] = job[i] or ''
    end
    local failed = job[1] == 'failed' or job[1] == 'dead' or job[1] == 'cancelled' or job[1] == 'expired'
    job[#FIELDS + 1] = failed and call('HGET', key, 'result') or ''
  end
  replies[#replies + 1] = job
end
return replies
