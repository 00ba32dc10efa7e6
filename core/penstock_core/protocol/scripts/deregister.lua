-- A worker leaves for good: its record and heartbeat go, and what it still holds goes back in line, no crash spent.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] worker string; ARGV[3], ARGV[4] the JobEnded record `cancelled` in two halves around the attempt
-- Returns the ids given back.
-- Refuses nothing.
--@include base waiting jobs

local worker, given = ARGV[2], {}
for _, job in ipairs((jobs_held_by(worker))) do
  if job.cancel == '1' then
    end_by_template(job, 'cancelled', ARGV[3], ARGV[4])
  else
    leave_worker(job)
    job.left = ''
    stand_in_resume(job)
    count('released')
    given[#given + 1] = job.id
  end
end
call('ZREM', Q .. 'heartbeats', worker)
call('HDEL', Q .. 'workers', worker)
flush()
if #given > 0 then
  call('PUBLISH', Q .. 'bell', 'job')
end
return given
