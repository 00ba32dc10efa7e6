-- Put right what points to jobs, from the jobs themselves: the pointers of waiting ones, the leases of running ones, the
-- due times of delayed ones. Somebody trimmed a stream, or deleted a key.
--
-- KEYS[1] prefix; ARGV[1] now_ms; then job ids; none: only say what is missing
-- Returns the ids mended; without ids {queued, running, delayed}: how many fewer entries there are than such jobs.
-- Refuses nothing.
--@include base waiting jobs

local GRACE_MS = 30000 -- a lease made anew lasts so long; its worker, if there is one, renews it before

local function missing()
  local found = call('HMGET', Q .. 'stats', 'queued', 'running', 'delayed')
  local waiting = 0
  for p = 0, 9 do
    for _, tenant in ipairs(call('ZRANGE', Q .. 'heads:' .. p, 0, -1)) do
      local line = p .. ':' .. tenant
      waiting = waiting + call('XLEN', Q .. 'ready:' .. line) + call('XLEN', Q .. 'resume:' .. line)
    end
  end
  return {
    math.max(0, num(found[1]) - waiting), math.max(0, num(found[2]) - call('ZCARD', Q .. 'leases')),
    math.max(0, num(found[3]) - call('ZCARD', Q .. 'delayed')),
  }
end

local function point_anew(job)
  tally(job.tenant, 'queued', -1) -- it is counted, and standing in counts it again
  local cost = num(job.input) + num(job.output)
  local entry = stand_in(job.at, job.id, job.priority, job.tenant, job.enqueued, cost, job.affinity, on_last_life(job))
  call('HSET', Q .. 'job:' .. job.id, 'entry', entry)
end

local function mend(job)
  if job.deadline ~= '' and (job.state == 'queued' or job.state == 'delayed') then
    call('ZADD', Q .. 'deadlines', 'NX', job.deadline, job.id)
  end
  if job.state == 'queued' then
    local stream = Q .. job.at .. ':' .. job.priority .. ':' .. job.tenant
    local found = call('XRANGE', stream, job.entry, job.entry)[1]
    local stands = found and entry_field(found[2], 'id') == job.id -- a stream made anew can repeat an entry id
    if stands and call('ZSCORE', Q .. 'heads:' .. job.priority, job.tenant)
      and call('ZSCORE', Q .. 'fair:' .. job.priority, job.tenant) then
      return false
    end
    if not stands then
      point_anew(job)
    end
    join_level(job.priority, job.tenant)
    refresh_head(job.priority, job.tenant)
    return true
  elseif job.state == 'running' then
    local known = call('SADD', Q .. 'held:' .. job.owner, job.id) == 0
    return call('ZADD', Q .. 'leases', 'NX', now + GRACE_MS, job.id) == 1 or not known
  elseif job.state == 'delayed' then
    return call('ZADD', Q .. 'delayed', 'NX', job.enqueued, job.id) == 1
  end
  return false
end

if #ARGV == 1 then
  return missing()
end
local mended = {}
for at = 2, #ARGV do
  local job = load_job(ARGV[at])
  if job and mend(job) then
    mended[#mended + 1] = job.id
  end
end
flush()
if #mended > 0 then
  call('PUBLISH', Q .. 'bell', 'job')
end
return mended
