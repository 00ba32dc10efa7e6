-- Cancel jobs: waiting ones end at once, running ones are marked and their workers rung.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] tenant string ('' for any); ARGV[3], ARGV[4] the JobEnded record `cancelled` in two halves around the attempt;
-- then job ids
-- Returns per job 'cancelled', 'cancelling' (it runs; its worker will end it), 'ended' (it had ended), or 'unknown'.
-- Refuses another tenant's job: 'unknown'.
--@include base waiting jobs

local replies = {}
for at = 5, #ARGV do
  local id = ARGV[at]
  local job = load_job(id)
  local reply
  if not job or (ARGV[2] ~= '' and job.tenant ~= ARGV[2]) then
    reply = 'unknown'
  elseif job.state == 'running' then
    call('HSET', Q .. 'job:' .. id, 'cancel', '1')
    call('PUBLISH', Q .. 'bell', 'cancel ' .. id)
    reply = 'cancelling'
  elseif job.state == 'queued' or job.state == 'delayed' then
    end_by_template(job, 'cancelled', ARGV[3], ARGV[4])
    reply = 'cancelled'
  else
    reply = 'ended'
  end
  replies[#replies + 1] = reply
end
flush()
return replies
