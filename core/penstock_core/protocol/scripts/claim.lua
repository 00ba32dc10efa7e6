-- Take waiting jobs that fit a worker's free room, most urgent first, fairly between tenants.
--
-- The level (priority) whose oldest head has the highest effective priority, priority + waited / aging interval, is
-- served. A head that has aged past every fresh job (effective priority >= 10) is itself served: that bounds waiting.
-- Otherwise the tenant with the least virtual token count is: that bounds unfairness (VTC). Within a tenant interrupted
-- jobs come first; then the first of the oldest 16 whose affinity tag no other live worker owns, or that has waited out
-- the patience. A job that does not fit ends the call, so that large jobs are not passed over for ever.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] worker string; ARGV[3] max_jobs int; ARGV[4] free_sequences int; ARGV[5] free_tokens int; ARGV[6] lease_ms int
-- ARGV[7] idle  '1' or '0': the worker holds nothing, so that the first job is taken whether or not it fits
-- ARGV[8], ARGV[9] the JobEnded record `expired`, in two halves around the attempt; ARGV[10], ARGV[11] the same for an
--   undecodable job; ARGV[12] its message
-- Returns {next_due_ms or '', queued jobs left, job, ...}; a job is
--   {id, attempt, request, priority, tenant, client, enqueued, claimed, deadline, crashes, errors, retries, trace, {chunk, ...}}
-- Refuses nothing. Jobs past their deadline end here; pointers to nothing are dead-lettered.
--@include base waiting jobs

local worker, max_jobs, free_sequences = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local free_tokens, lease_ms, idle = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7] == '1'
local aging, patience = setting('aging_interval_ms'), setting('patience_ms')
local WINDOW, PAGE, AGED, MAX_DROPPED = 16, 32, 10, 1000
local AFFINITY_MS = 600000

local due -- earliest time at which something becomes claimable without a ring of the bell
local function due_at(t)
  if not due or t < due then
    due = t
  end
end

local open = {} -- tenant -> whether its running limit has room
local room = {} -- tenant -> how many more it may run
local function is_open(tenant)
  local known = open[tenant]
  if known == nil then
    local limit = tenant_limit('max_running', tenant)
    if limit > 0 then
      room[tenant] = limit - num(call('HGET', Q .. 'tenant:' .. tenant, 'running'))
      known = room[tenant] > 0
    else
      known = true
    end
    open[tenant] = known
  end
  return known
end

local passed = {} -- level and tenant whose jobs all wait for another worker, for this call

-- The first tenant of a level's order that may be served.
local function first_open(order, priority)
  local from, size = 0, 4
  while true do
    local page = call('ZRANGE', order .. priority, from, from + size - 1, 'WITHSCORES')
    for i = 1, #page, 2 do
      if not passed[priority .. ':' .. page[i]] and is_open(page[i]) then
        return page[i], tonumber(page[i + 1])
      end
    end
    if #page < 2 * size then
      return nil
    end
    from, size = from + size, PAGE
  end
end

local owners = {} -- affinity tag -> true where another live worker owns it
local function owned_elsewhere(tag)
  local known = owners[tag]
  if known == nil then
    local owner = call('GET', Q .. 'affinity:' .. tag)
    known = false
    if owner and owner ~= worker then
      local beat = call('ZSCORE', Q .. 'heartbeats', owner)
      known = beat and tonumber(beat) > now - lease_ms or false
    end
    owners[tag] = known
  end
  return known
end

local dropped = 0
local lines = {} -- level and tenant -> what is known of its two streams

local function line_of(priority, tenant)
  local name = priority .. ':' .. tenant
  local line = lines[name]
  if not line then
    line = { priority = priority, tenant = tenant, ready = {}, resume = {} }
    for _, at in ipairs({ 'ready', 'resume' }) do
      line[at] = { at = at, key = Q .. at .. ':' .. name, last = nil, spent = false }
    end
    lines[name] = line
  end
  return line
end

-- A pointer that leads nowhere: out of the stream, into the dead letters.
local function drop_pointer(stream, entry, id, why)
  call('XDEL', stream.key, entry)
  dead_letter(id or '', 'undecodable', why .. ' (entry ' .. entry .. ' of ' .. stream.key .. ')')
  count('undecodable')
  dropped = dropped + 1
end

-- Have up to `wanted` well-formed pointers of a stream at hand, oldest first.
local function fill(stream, wanted)
  while #stream < wanted and not stream.spent do
    local page = call('XRANGE', stream.key, stream.last and '(' .. stream.last or '-', '+', 'COUNT', PAGE)
    stream.spent = #page < PAGE
    for i = 1, #page do
      local entry, fields = page[i][1], page[i][2]
      stream.last = entry
      local id, t = entry_field(fields, 'id'), tonumber(entry_field(fields, 't'))
      if not id or not t then
        drop_pointer(stream, entry, id, 'the pointer names no job or no time')
      else
        stream[#stream + 1] = {
          entry = entry, id = id, t = t, cost = num(entry_field(fields, 'cost')), tag = entry_field(fields, 'tag') or '',
        }
      end
    end
  end
  return stream
end

-- Which job of a tenant is next: its stream and position there, or nil where all wait for another worker.
local function choose(line, by_age)
  local resume, ready = fill(line.resume, 1), fill(line.ready, by_age and 1 or WINDOW)
  if by_age and resume[1] and ready[1] then
    return resume[1].t <= ready[1].t and resume or ready, 1
  end
  if resume[1] then
    return resume, 1
  end
  for i = 1, math.min(#ready, WINDOW) do
    local pointer = ready[i]
    if by_age or pointer.tag == '' or now - pointer.t >= patience or not owned_elsewhere(pointer.tag) then
      return ready, i
    end
    due_at(pointer.t + patience)
  end
  return nil
end

local levels = {} -- priority -> {tenant, t} of its oldest head
local waits = {}  -- priorities anyone waits in, open or not

local function look(priority)
  local tenant, t = first_open(Q .. 'heads:', priority)
  levels[priority] = tenant and { tenant = tenant, t = t } or nil
end

-- A pointer left a tenant's line: set its head anew.
local function advance(line)
  local ready, resume = fill(line.ready, 1)[1], fill(line.resume, 1)[1]
  local head = ready and ready.t
  if resume and (not head or resume.t < head) then
    head = resume.t
  end
  if head then
    call('ZADD', Q .. 'heads:' .. line.priority, head, line.tenant)
  else
    refresh_head(line.priority, line.tenant)
  end
  look(line.priority)
end

-- Virtual tokens of a claimed job, now, and visible to the next choice of this call.
local function charge_now(job)
  local target = num(job.input) + 2 * math.max(num(job.output), num(job.tokens))
  local delta = target - num(job.charged)
  if delta ~= 0 then
    local score = call('ZINCRBY', Q .. 'tenants', delta, job.tenant)
    for i = 1, #waits do
      call('ZADD', Q .. 'fair:' .. waits[i], 'XX', score, job.tenant)
    end
    job.charged = target
  end
end

local leases, held, claimed = {}, {}, {}

local function start(job, request, trace)
  local key = Q .. 'job:' .. job.id
  local attempt = num(job.attempt) + 1
  charge_now(job)
  call('HSET', key, 'state', 'running', 'owner', worker, 'attempt', attempt, 'started', now, 'charged', job.charged,
    'at', '', 'entry', '', 'left', '')
  if job.deadline ~= '' then
    call('ZREM', Q .. 'deadlines', job.id)
  end
  if job.affinity ~= '' and owners[job.affinity] ~= worker then
    call('SET', Q .. 'affinity:' .. job.affinity, worker, 'PX', AFFINITY_MS)
    owners[job.affinity] = false
  end
  tally(job.tenant, 'queued', -1)
  tally(job.tenant, 'running', 1)
  count('waiting_bytes', -num(job.bytes))
  if room[job.tenant] then
    room[job.tenant] = room[job.tenant] - 1
    open[job.tenant] = room[job.tenant] > 0
  end
  local chunks = {}
  if job.attempt ~= '0' then
    local log = call('XRANGE', Q .. 'events:' .. job.id, '-', '+')
    for i = 1, #log do
      chunks[i] = entry_field(log[i][2], 'c')
    end
  end
  leases[#leases + 1] = now + lease_ms
  leases[#leases + 1] = job.id
  held[#held + 1] = job.id
  claimed[#claimed + 1] = {
    job.id, attempt, request, job.priority, job.tenant, job.client, job.enqueued, now, job.deadline, job.crashes,
    job.errors, job.retries, trace or '', chunks,
  }
end

-- Take the pointer at `position` of a stream. Returns false where the job does not fit.
local function take(line, stream, position)
  local pointer = stream[position]
  local job = load_job(pointer.id)
  if not job or job.state ~= 'queued' or job.entry ~= pointer.entry or job.at ~= stream.at then
    table.remove(stream, position)
    drop_pointer(stream, pointer.entry, pointer.id, job and 'the job waits elsewhere' or 'the job it names is gone')
    return true
  end
  local expired = past_deadline(job.deadline)
  if not expired and pointer.cost > free_tokens and not (idle and #claimed == 0) then
    return false
  end
  table.remove(stream, position)
  if expired then
    end_by_template(job, 'expired', ARGV[8], ARGV[9])
    dropped = dropped + 1
    return true
  end
  local rest = call('HMGET', Q .. 'job:' .. job.id, 'request', 'trace')
  if not rest[1] then
    end_dead(job, 'undecodable', ARGV[12], ARGV[10] .. pack_uint(num(job.attempt)) .. ARGV[11], '')
    dropped = dropped + 1
    return true
  end
  call('XDEL', stream.key, pointer.entry)
  start(job, rest[1], rest[2])
  free_tokens = free_tokens - pointer.cost
  return true
end

for p = 9, 0, -1 do
  look(p)
  if levels[p] or call('EXISTS', Q .. 'heads:' .. p) == 1 then
    waits[#waits + 1] = p
  end
end

local wanted = math.min(max_jobs, free_sequences)
while #claimed < wanted and dropped < MAX_DROPPED do
  local best, effective
  for i = 1, #waits do
    local level = levels[waits[i]]
    if level then
      local value = waits[i] + (now - level.t) / aging
      if not best or value > effective then
        best, effective = waits[i], value
      end
    end
  end
  if not best then
    break
  end
  local by_age = effective >= AGED
  local tenant = by_age and levels[best].tenant or first_open(Q .. 'fair:', best)
  if not tenant then
    levels[best] = nil
  else
    local line = line_of(best, tenant)
    local stream, position = choose(line, by_age)
    if stream then
      if not take(line, stream, position) then
        break
      end
      advance(line)
    elseif line.ready[1] then
      passed[best .. ':' .. tenant] = true
      look(best)
    else
      advance(line)
    end
  end
end

if #claimed > 0 then
  call('ZADD', Q .. 'leases', unpack(leases))
  call('SADD', Q .. 'held:' .. worker, unpack(held))
  count('claimed', #claimed)
  -- The recent rate of departures, exponentially decayed: submit's retry-after is made from it.
  local rate = call('HMGET', Q .. 'stats', 'rate_count', 'rate_at')
  local faded = num(rate[1]) * math.exp(-math.max(0, now - num(rate[2])) / RATE_WINDOW_MS)
  call('HSET', Q .. 'stats', 'rate_count', string.format('%.3f', faded + #claimed), 'rate_at', now)
end
local next_delayed = call('ZRANGE', Q .. 'delayed', 0, 0, 'WITHSCORES')[2]
if next_delayed then
  due_at(tonumber(next_delayed))
end
flush()
local reply = { due or '', num(call('HGET', Q .. 'stats', 'queued')) }
for i = 1, #claimed do
  reply[i + 2] = claimed[i]
end
return reply
