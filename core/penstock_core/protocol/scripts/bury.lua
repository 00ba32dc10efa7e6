-- Dead-letter running jobs that can never run, such as those whose request cannot be decoded.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] worker string; then 5 values per record:
--   id string; attempt int; code string; message string; ended bytes (JobEnded)
-- Returns per record 'ok' or 'fenced'. A repetition after a lost reply answers 'ok' and changes nothing.
-- Refuses a stale owner or attempt: 'fenced', and counted.
--@include base waiting jobs

local worker, replies = ARGV[2], {}
for at = 3, #ARGV, 5 do
  local job, other = held_job(ARGV[at], worker, ARGV[at + 1])
  local reply = 'ok'
  if job then
    end_dead(job, ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], worker)
  elseif not (other and other.owner == worker and other.attempt == ARGV[at + 1]) then
    reply = fence(ARGV[at], worker, ARGV[at + 1])
  end
  replies[#replies + 1] = reply
end
flush()
return replies
