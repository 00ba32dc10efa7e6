-- Give running jobs back with their checkpoint (drain): next in line, no crash and no retry spent.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] worker string; ARGV[3] 'these' (the holds listed) or 'others' (all the worker is on record for, except the
--   holds listed: what a claim gave whose reply was lost); ARGV[4], ARGV[5] the JobEnded record `cancelled` in two
--   halves around the attempt; ARGV[6], ARGV[7] the same for `expired`; then per hold: id string; attempt int
-- Returns 'these': per hold 'ok', 'cancelled' or 'expired' (ended so), or 'fenced'; a repetition gets 'ok' again.
--   'others': the ids given back.
-- Refuses a stale owner or attempt: 'fenced', and counted.
--@include base waiting jobs

local worker, ring = ARGV[2], false

local function give_back(job)
  local asked = verdict(job.cancel, job.deadline)
  if asked == 'cancelled' then
    end_by_template(job, asked, ARGV[4], ARGV[5], worker)
  elseif asked == 'expired' then
    end_by_template(job, asked, ARGV[6], ARGV[7], worker)
  else
    leave_worker(job)
    job.left = worker .. ':' .. job.attempt
    stand_in_resume(job)
    count('released')
    ring = true
  end
  return asked
end

local function release(id, attempt)
  local job, other = held_job(id, worker, attempt)
  if job then
    return give_back(job)
  end
  if other and other.attempt == attempt then
    if other.left == worker .. ':' .. attempt then
      return 'ok'
    end
    if other.owner == worker and (other.state == 'cancelled' or other.state == 'expired') then
      return other.state
    end
  end
  return fence(id, worker, attempt)
end

local replies = {}
if ARGV[3] == 'these' then
  for at = 8, #ARGV, 2 do
    replies[#replies + 1] = release(ARGV[at], ARGV[at + 1])
  end
else
  local known = {}
  for at = 8, #ARGV, 2 do
    known[ARGV[at] .. ':' .. ARGV[at + 1]] = true
  end
  for _, job in ipairs((jobs_held_by(worker))) do
    if not known[job.id .. ':' .. job.attempt] then
      give_back(job)
      replies[#replies + 1] = job.id
    end
  end
end
flush()
if ring then
  call('PUBLISH', Q .. 'bell', 'job')
end
return replies
