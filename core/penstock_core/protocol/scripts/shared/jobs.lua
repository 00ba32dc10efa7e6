-- A job's hash as a table, and the ways out of a state: leaving a worker, going back to wait, ending.

local NAMES = {
  'state', 'owner', 'attempt', 'tenant', 'priority', 'client', 'deadline', 'ttl', 'dedupe', 'input', 'output', 'charged',
  'tokens', 'log_bytes', 'submitted', 'enqueued', 'cancel', 'crashes', 'errors', 'retries', 'at', 'entry', 'affinity', 'left',
}
-- What end_job needs of a running job, and the offset of its first choice.
local NAMES_TO_END = {
  'state', 'owner', 'attempt', 'tenant', 'client', 'ttl', 'dedupe', 'input', 'charged', 'tokens', 'log_bytes', 'off:0',
}

-- The job's fields by name ('' where unset), or nil where there is no such job.
local function load_job(id, names)
  names = names or NAMES
  local values = call('HMGET', Q .. 'job:' .. id, unpack(names))
  if not values[1] then
    return nil
  end
  local job = { id = id }
  for i = 1, #names do
    job[names[i]] = values[i] or ''
  end
  if job.enqueued == '' then
    job.enqueued = job.submitted
  end
  return job
end

-- The fencing check: the job, if this worker's this attempt is the one that runs it; else nil, and what was found.
local function held_job(id, worker, attempt, names)
  local job = load_job(id, names)
  if job and job.state == 'running' and job.owner == worker and job.attempt == attempt then
    return job
  end
  return nil, job
end

-- The answer to a write with a stale owner or attempt. A worker that was taken for gone and is heard of was not: what
-- counted as a crash of the job becomes a loss, of which it may have ten times as many.
local function fence(id, worker, attempt)
  count('fenced')
  local key, field = Q .. 'job:' .. id, 'lost:' .. attempt
  local job = call('HMGET', key, field, 'crashes', 'losses', 'state')
  if job[1] == worker and job[4] ~= 'dead' then
    call('HDEL', key, field)
    call('HSET', key, 'crashes', num(job[2]) - 1, 'losses', num(job[3]) + 1)
  end
  return 'fenced'
end

local function past_deadline(deadline)
  return deadline ~= '' and tonumber(deadline) <= now
end

-- What a worker that rightly holds a job is told: go on, or stop and finish it as cancelled or expired.
local function verdict(cancel, deadline)
  if cancel == '1' then
    return 'cancelled'
  end
  if deadline and past_deadline(deadline) then
    return 'expired'
  end
  return 'ok'
end

-- The jobs a worker is on record for, longest waiting first (so that they go back in that order), at most `limit`, and
-- whether these are all. Ids that are no jobs of the worker's are taken off its record.
local function jobs_held_by(worker, limit)
  local jobs, all = {}, true
  for _, id in ipairs(call('SMEMBERS', Q .. 'held:' .. worker)) do
    local job = load_job(id)
    if not job or job.state ~= 'running' or job.owner ~= worker then
      call('SREM', Q .. 'held:' .. worker, id)
    elseif #jobs == limit then
      all = false
    else
      jobs[#jobs + 1] = job
    end
  end
  table.sort(jobs, function(a, b)
    if a.enqueued == b.enqueued then
      return a.id < b.id
    end
    return num(a.enqueued) < num(b.enqueued)
  end)
  return jobs, all
end

-- Make the tenant's virtual count reflect `target` virtual tokens for this job, whatever was charged before.
local function charge_to(job, target)
  local delta = target - num(job.charged)
  if delta ~= 0 then
    tally(job.tenant, 'charge', delta)
    job.charged = target
  end
end

-- A worker lets go of a running job: lease, held set and counts. An estimate charged at claim becomes the actual count.
local function leave_worker(job)
  local ids = leaving[job.owner]
  if not ids then
    ids = {}
    leaving[job.owner] = ids
  end
  ids[#ids + 1] = job.id
  tally(job.tenant, 'running', -1)
  charge_to(job, num(job.input) + 2 * num(job.tokens))
end

local function request_bytes(id)
  return call('HSTRLEN', Q .. 'job:' .. id, 'request')
end

-- Back to wait with its checkpoint, ahead of jobs never started, aged by its whole wait.
local function stand_in_resume(job)
  local cost = num(job.input) + num(job.output)
  local entry = stand_in('resume', job.id, job.priority, job.tenant, job.enqueued, cost, job.affinity, on_last_life(job))
  call('HSET', Q .. 'job:' .. job.id, 'state', 'queued', 'owner', '', 'at', 'resume', 'entry', entry, 'crashes',
    job.crashes, 'charged', job.charged, 'left', job.left)
  count('waiting_bytes', request_bytes(job.id))
  if job.deadline ~= '' then
    call('ZADD', Q .. 'deadlines', job.deadline, job.id)
  end
end

-- Out of the waiting places, before ending or starting.
local function leave_waiting(job)
  if job.state == 'queued' then
    call('XDEL', Q .. job.at .. ':' .. job.priority .. ':' .. job.tenant, job.entry)
    refresh_head(job.priority, job.tenant)
    tally(job.tenant, 'queued', -1)
  else
    call('ZREM', Q .. 'delayed', job.id)
    tally(job.tenant, 'delayed', -1)
  end
  count('waiting_bytes', -request_bytes(job.id))
  if job.deadline ~= '' then
    call('ZREM', Q .. 'deadlines', job.id)
  end
end

local function dead_letter(id, code, message)
  return call('XADD', Q .. 'dead', 'MAXLEN', '~', setting('max_dead'), '*', 'id', id, 'code', code, 'message', message,
    't', now)
end

-- The end of a job, whatever led to it: exactly one terminal event, which closes its log, and a lifetime for all it
-- leaves. `ended` is the JobEnded record; `owner` stays in the hash where the worker itself ended the job, so that its
-- call repeated after a lost reply is recognised, and is '' otherwise. `more` are further fields and values to store.
local function end_job(job, state, ended, owner, more)
  if job.state == 'running' then
    leave_worker(job)
  else
    leave_waiting(job)
  end
  local key = Q .. 'job:' .. job.id
  local ttl = job.ttl
  local fields = more or {}
  local n = #fields
  fields[n + 1], fields[n + 2], fields[n + 3], fields[n + 4], fields[n + 5], fields[n + 6] =
    'state', state, 'finished', now_text, 'result', ended
  n = n + 6
  if owner ~= job.owner then
    fields[n + 1], fields[n + 2] = 'owner', owner
    n = n + 2
  end
  if state == 'dead' then
    ttl = text(math.max(num(ttl), setting('dead_ttl_ms')))
    fields[n + 1], fields[n + 2] = 'crashes', job.crashes
  elseif state ~= 'failed' then
    fields[n + 1], fields[n + 2] = 'request', '' -- nobody runs it again: give its memory back
  end
  call('HSET', key, unpack(fields))
  if job.log_bytes ~= '' then
    call('PEXPIRE', Q .. 'events:' .. job.id, ttl)
  end
  call('PEXPIRE', key, ttl)
  if job.dedupe ~= '' then
    call('PEXPIRE', Q .. 'dedupe:' .. job.tenant .. ':' .. job.dedupe, ttl)
  end
  tell(job.id, job.client, ended)
  count(state)
end

-- Terminal events a script must write by itself come as the record's two halves around the attempt.
local function end_by_template(job, state, head, tail, owner)
  end_job(job, state, head .. pack_uint(num(job.attempt)) .. tail, owner or '')
end

-- As above for a dead job, with its letter; the letter's entry id lets requeue and purge remove it.
local function end_dead(job, code, message, ended, owner)
  end_job(job, 'dead', ended, owner)
  call('HSET', Q .. 'job:' .. job.id, 'letter', dead_letter(job.id, code, message))
end
