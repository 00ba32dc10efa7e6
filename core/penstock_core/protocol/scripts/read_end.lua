-- How jobs ended, if they have. Read-only.
--
-- KEYS[1] prefix; ARGV[1] now_ms (unused by reads of the clock); then job ids
-- Returns per job an empty list (no such job), or {state, the terminal record or ''}.
-- Refuses nothing.
--@include base

local replies = {}
for at = 2, #ARGV do
  local job = call('HMGET', Q .. 'job:' .. ARGV[at], 'state', 'result')
  replies[#replies + 1] = job[1] and { job[1], job[2] or '' } or {}
end
return replies
