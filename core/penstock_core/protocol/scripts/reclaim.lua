-- The queue's upkeep, done by any worker at any time: take jobs from workers that are gone, make due jobs ready, end
-- waiting jobs whose deadline passed, forget workers and tenants that matter no more. At most `limit` jobs of each kind.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] limit int; ARGV[3] worker string and ARGV[4] heartbeat_ms int: a worker shown to be gone, and the heartbeat
--   that was read before that was found out ('' and 0: only expired leases); ARGV[5] sure '1' or '0': it is known to be
--   dead, and not only unheard of
-- ARGV[6], ARGV[7] the JobEnded record `cancelled` in two halves around the attempt; ARGV[8], ARGV[9] `expired`;
-- ARGV[10], ARGV[11] the same for a poison job, less its message, which ends the record
-- Returns {{requeued id, ...}, {dead id, ...}, {ended id, ...}, promoted, {delay_ms per reclaimed job},
--   {reclaimed id, its attempt, ...}}.
-- Refuses a worker that has beaten since: its jobs are left alone.
--@include base waiting jobs

local limit, gone, heartbeat = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local sure = ARGV[5] == '1'
local max_crashes = setting('max_crashes')
local max_taken = 10 * max_crashes -- from workers dead and alive: a job that stalls its workers must end too
local FORGET_WORKER_MS = 60000

local requeued, dead, ended, delays, taken, promoted = {}, {}, {}, {}, {}, 0

-- Why a job is run no more, or nil.
local function poison(job)
  local losses = num(call('HGET', Q .. 'job:' .. job.id, 'losses'))
  if job.crashes >= max_crashes then
    return 'it crashed its workers ' .. job.crashes .. ' times (max_crashes ' .. max_crashes .. ')'
  elseif job.crashes + losses >= max_taken then
    return 'it was taken from its workers ' .. job.crashes + losses .. ' times, most of them alive but not heard of '
      .. '(max_crashes ' .. max_crashes .. ', times 10)'
  end
end

-- Take a job from a worker that is gone; `since` is when it should have been heard of.
local function take_back(job, since, dead_for_sure)
  delays[#delays + 1] = math.max(0, now - since)
  taken[#taken + 1] = job.id
  taken[#taken + 1] = job.attempt
  count('reclaimed')
  job.crashes = num(job.crashes) + 1
  local asked, reason = verdict(job.cancel, job.deadline), poison(job)
  if asked == 'cancelled' then
    end_by_template(job, asked, ARGV[6], ARGV[7])
    ended[#ended + 1] = job.id
  elseif asked == 'expired' then
    end_by_template(job, asked, ARGV[8], ARGV[9])
    ended[#ended + 1] = job.id
  elseif reason then
    end_dead(job, 'poison', reason, ARGV[10] .. pack_uint(num(job.attempt)) .. ARGV[11] .. pack_text(reason), '')
    dead[#dead + 1] = job.id
  else
    if not dead_for_sure then
      call('HSET', Q .. 'job:' .. job.id, 'lost:' .. job.attempt, job.owner)
    end
    leave_worker(job)
    job.left = ''
    stand_in_resume(job)
    requeued[#requeued + 1] = job.id
  end
end

local function reclaim_gone_worker()
  local beat = call('ZSCORE', Q .. 'heartbeats', gone)
  if not beat or tonumber(beat) ~= heartbeat then
    return
  end
  local jobs, all = jobs_held_by(gone, limit)
  for _, job in ipairs(jobs) do
    take_back(job, heartbeat, sure)
  end
  if all then
    call('ZREM', Q .. 'heartbeats', gone)
    call('HDEL', Q .. 'workers', gone)
  end
end

local function reclaim_expired_leases()
  local late = call('ZRANGEBYSCORE', Q .. 'leases', '-inf', now, 'WITHSCORES', 'LIMIT', 0, limit)
  for i = 1, #late, 2 do
    local job = load_job(late[i])
    if job and job.state == 'running' then
      take_back(job, tonumber(late[i + 1]))
    else
      call('ZREM', Q .. 'leases', late[i])
    end
  end
end

local function expire_waiting()
  for _, id in ipairs(call('ZRANGEBYSCORE', Q .. 'deadlines', '-inf', now, 'LIMIT', 0, limit)) do
    local job = load_job(id)
    if job and (job.state == 'queued' or job.state == 'delayed') then
      end_by_template(job, 'expired', ARGV[8], ARGV[9])
      ended[#ended + 1] = id
    else
      call('ZREM', Q .. 'deadlines', id)
    end
  end
end

local function promote_due()
  local due = call('ZRANGEBYSCORE', Q .. 'delayed', '-inf', now, 'WITHSCORES', 'LIMIT', 0, limit)
  for i = 1, #due, 2 do
    local id, t = due[i], due[i + 1]
    local job = load_job(id)
    call('ZREM', Q .. 'delayed', id)
    if job and job.state == 'delayed' then
      tally(job.tenant, 'delayed', -1)
      local cost = num(job.input) + num(job.output)
      local entry = stand_in('ready', id, job.priority, job.tenant, t, cost, job.affinity, on_last_life(job))
      call('HSET', Q .. 'job:' .. id, 'state', 'queued', 'enqueued', t, 'at', 'ready', 'entry', entry)
      promoted = promoted + 1
    end
  end
end

local function forget()
  for _, worker in ipairs(call('ZRANGEBYSCORE', Q .. 'heartbeats', '-inf', now - FORGET_WORKER_MS)) do
    if call('EXISTS', Q .. 'held:' .. worker) == 0 then
      call('ZREM', Q .. 'heartbeats', worker)
      call('HDEL', Q .. 'workers', worker)
    end
  end
  -- A tenant below the least count is lifted to it on return, so its own count says nothing more.
  call('ZREMRANGEBYSCORE', Q .. 'tenants', '-inf', '(' .. string.format('%.17g', least_count()))
end

if gone ~= '' then
  reclaim_gone_worker()
end
reclaim_expired_leases()
expire_waiting()
promote_due()
count('promoted', promoted)
flush()
forget()
if #requeued > 0 or promoted > 0 then
  call('PUBLISH', Q .. 'bell', 'job')
end
return { requeued, dead, ended, promoted, delays, taken }
