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
--   undecodable job; ARGV[12] its message; ARGV[13] '1' or '0': the worker holds no job on its last life, and so may take
--   one (see on_last_life)
-- Returns {next_due_ms or '', queued jobs left, job, ...}; a job is
--   {id, head, request, tenant, client, trace, {chunk, ...}}, the head nine numbers with a space between: attempt, priority,
--   enqueued, claimed, deadline (0 none), crashes, errors, retries, 1 where it is on its last life
-- Refuses nothing. Jobs past their deadline end here; pointers to nothing are dead-lettered.
--@include base waiting jobs

local worker, max_jobs, free_sequences = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local free_tokens, lease_ms, idle = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7] == '1'
local may_take_last = ARGV[13] == '1'
local aging, patience = setting('aging_interval_ms'), setting('patience_ms')
local WINDOW, PAGE, AGED, MAX_DROPPED = 16, 32, 10, 1000

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

-- The two orders of a level, heads and fair, as far as this call has read them: the first few tenants that may be served,
-- and the horizon, the score from which on there may be others. Changes stay here until written back.
local FEW = 8
local passed = {} -- level -> tenants that have nothing (more) for this worker, for this call
for p = 0, 9 do
  passed[p] = {}
end

-- Whether there is anybody in the order at all.
local function read_order(order)
  for i = 1, #order do
    if order[i].changed then
      call('ZADD', order.key, 'XX', order[i].score, order[i].tenant)
    end
    order[i] = nil
  end
  order.horizon = nil
  local from, somebody = 0, false
  repeat
    local page = call('ZRANGE', order.key, text(from), text(from + FEW), 'WITHSCORES')
    for i = 1, #page, 2 do
      local tenant, score = page[i], tonumber(page[i + 1])
      if not passed[order.priority][tenant] and is_open(tenant) then
        if #order == FEW then
          order.horizon = score
          return true
        end
        order[#order + 1] = { tenant = tenant, score = score }
      end
    end
    from, somebody = from + FEW + 1, somebody or #page > 0
  until #page < 2 * (FEW + 1)
  return somebody
end

-- The tenant with the least score that may be served, or nil.
local function least_of(order)
  local done = passed[order.priority]
  for _ = 1, 2 do
    local best, least
    for i = 1, #order do
      local place = order[i]
      if (not best or place.score < least) and open[place.tenant] and not done[place.tenant] then
        best, least = place, place.score
      end
    end
    if not order.horizon or (best and least <= order.horizon) then
      return best
    end
    read_order(order)
  end
  return nil
end

local function rescore(order, tenant, score)
  for i = 1, #order do
    local place = order[i]
    if place.tenant == tenant then
      if place.score ~= score then
        place.score, place.changed = score, true
      end
      return
    end
  end
end

-- Who last ran a job with an affinity tag: a direct-mapped table, so that its size is bounded whatever the tags.
-- A slot holds `<time> <worker> <tag>`; a later tag of the same slot takes it over.
local AFFINITY_MS = 600000
local function affinity_slot(tag)
  local slot = 0
  for i = 1, #tag do
    slot = (slot * 31 + string.byte(tag, i)) % 65536
  end
  return slot
end

local function affinity_owner(tag)
  local slot = call('HGET', Q .. 'affinity', affinity_slot(tag))
  if not slot then
    return nil
  end
  local t, owner, held_tag = string.match(slot, '^(%d+) (%S+) (.*)$')
  return held_tag == tag and now - tonumber(t) < AFFINITY_MS and owner or nil
end

local taken_tags = {} -- flat list of slots and what they shall hold
local ours = {} -- affinity tags taken by this call
local owners = {} -- affinity tag -> true where another live worker owns it
local function owned_elsewhere(tag)
  local known = owners[tag]
  if known == nil then
    local owner = affinity_owner(tag)
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
local lines = {} -- what is known of the two streams of each level and tenant
local line_at = {} -- level -> tenant -> its line
for p = 0, 9 do
  line_at[p] = {}
end

-- Pointers stand at stream[head] to stream[tail], oldest first.
local function stream_of(at, name)
  return { at = at, key = Q .. at .. ':' .. name, head = 1, tail = 0, last = nil, spent = false, taken = {} }
end

local function line_of(priority, tenant)
  local line = line_at[priority][tenant]
  if not line then
    local name = priority .. ':' .. tenant
    line = {
      priority = priority, tenant = tenant, started = 0, ready = stream_of('ready', name), resume = stream_of('resume', name),
    }
    line_at[priority][tenant] = line
    lines[#lines + 1] = line
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

-- Have up to `wanted` well-formed pointers of a stream at hand.
local function fill(stream, wanted)
  while stream.tail - stream.head + 1 < wanted and not stream.spent do
    local page = call('XRANGE', stream.key, stream.last and '(' .. stream.last or '-', '+', 'COUNT', PAGE)
    stream.spent = #page < PAGE
    for i = 1, #page do
      local entry, fields = page[i][1], page[i][2]
      stream.last = entry
      local id, t, cost, tag, last
      if fields[1] == 'id' and fields[3] == 't' and fields[5] == 'cost' and fields[7] == 'tag' then
        id, t, cost, tag, last = fields[2], tonumber(fields[4]), num(fields[6]), fields[8], fields[9] == 'last'
      else
        id, t = entry_field(fields, 'id'), tonumber(entry_field(fields, 't'))
        cost, tag = num(entry_field(fields, 'cost')), entry_field(fields, 'tag') or ''
      end
      if not id or not t then
        drop_pointer(stream, entry, id, 'the pointer names no job or no time')
      else
        stream.tail = stream.tail + 1
        stream[stream.tail] = { entry = entry, id = id, t = t, cost = cost, tag = tag, last = last }
      end
    end
  end
  return stream[stream.head]
end

-- Take the pointer at a position out; those before it, a window at most, move up.
local function take_out(stream, position)
  for i = position, stream.head + 1, -1 do
    stream[i] = stream[i - 1]
  end
  stream[stream.head] = nil
  stream.head = stream.head + 1
end

-- Position of the first interrupted job this worker may take, or nil. Those on their last life stand aside while it has
-- one, a page of them at most.
local function takeable(stream)
  if not fill(stream, 1) then
    return nil
  end
  if may_take_last or not stream[stream.head].last then
    return stream.head
  end
  fill(stream, PAGE)
  for i = stream.head, math.min(stream.tail, stream.head + PAGE - 1) do
    if not stream[i].last then
      return i
    end
  end
  return nil
end

-- Which job of a tenant is next: its stream and position there, or nil where all wait for another worker.
local function choose(line, by_age)
  local resume, ready = line.resume, line.ready
  local at, first = takeable(resume), fill(ready, by_age and 1 or WINDOW)
  if at and not (by_age and first and first.t < resume[at].t) then
    return resume, at
  end
  for i = ready.head, math.min(ready.tail, ready.head + WINDOW - 1) do
    local pointer = ready[i]
    if may_take_last or not pointer.last then
      if by_age or pointer.tag == '' or now - pointer.t >= patience or not owned_elsewhere(pointer.tag) then
        return ready, i
      end
      due_at(pointer.t + patience)
    end
  end
  return nil
end

local levels = {} -- most urgent first: {priority, heads, fair}

-- A pointer left a tenant's line: its head may be another.
local function advance(level, line)
  local at = takeable(line.resume)
  local ready, resume = fill(line.ready, 1), at and line.resume[at]
  local head = ready and ready.t
  if resume and (not head or resume.t < head) then
    head = resume.t
  end
  if head then
    rescore(level.heads, line.tenant, head)
  else
    passed[line.priority][line.tenant] = true
  end
end

local charges = {} -- tenant -> virtual tokens charged by this call

-- Charge a claimed job's virtual tokens, at once visible to the next choice of this call.
local function charge_now(tenant, delta)
  charges[tenant] = (charges[tenant] or 0) + delta
  for i = 1, #levels do
    local fair = levels[i].fair
    for j = 1, #fair do
      if fair[j].tenant == tenant then
        fair[j].score, fair[j].changed = fair[j].score + delta, true
      end
    end
  end
end

local FIELDS = {
  'state', 'entry', 'at', 'deadline', 'request', 'attempt', 'input', 'output', 'submitted', 'client', 'enqueued', 'retries',
  'trace',
}
local FIRST = {} -- a job's first attempt has none of the fields that later ones have
local lease_until = string.format('%.0f', now + lease_ms)
local leases, held, claimed, started_bytes = {}, {}, {}, 0

local function start(line, pointer, job)
  local id, tenant, tag = pointer.id, line.tenant, pointer.tag
  local attempt = text(num(job[6]) + 1)
  local past = job[6] and call('HMGET', Q .. 'job:' .. id, 'tokens', 'charged', 'crashes', 'errors') or FIRST
  local charged = num(job[7]) + 2 * math.max(num(job[8]), num(past[1]))
  charge_now(tenant, charged - num(past[2]))
  call('HSET', Q .. 'job:' .. id, 'state', 'running', 'owner', worker, 'attempt', attempt, 'started', now_text, 'charged',
    text(charged))
  if job[4] then
    call('ZREM', Q .. 'deadlines', id)
  end
  if tag ~= '' and not ours[tag] then
    taken_tags[#taken_tags + 1] = affinity_slot(tag)
    taken_tags[#taken_tags + 1] = now_text .. ' ' .. worker .. ' ' .. tag
    ours[tag], owners[tag] = true, false
  end
  line.started = line.started + 1
  started_bytes = started_bytes + #job[5]
  if room[tenant] then
    room[tenant] = room[tenant] - 1
    open[tenant] = room[tenant] > 0
  end
  local chunks = {}
  if job[6] then
    local log = call('XRANGE', Q .. 'events:' .. id, '-', '+')
    for i = 1, #log do
      chunks[i] = entry_field(log[i][2], 'c')
    end
  end
  local n = #claimed + 1
  leases[2 * n - 1], leases[2 * n] = lease_until, id
  held[n] = id
  if pointer.last then
    may_take_last = false
  end
  local head = attempt .. ' ' .. line.priority .. ' ' .. (job[11] or job[9]) .. ' ' .. now_text .. ' '
    .. text(num(job[4])) .. ' ' .. text(num(past[3])) .. ' ' .. text(num(past[4])) .. ' ' .. (job[12] or '0')
    .. (pointer.last and ' 1' or ' 0')
  claimed[n] = { id, head, job[5], tenant, job[10] or '', job[13] or '', chunks }
end

-- Take the pointer at `position` of a stream. Returns false where the job does not fit.
local function take(line, stream, position)
  local pointer = stream[position]
  local job = call('HMGET', Q .. 'job:' .. pointer.id, unpack(FIELDS))
  if job[1] ~= 'queued' or job[2] ~= pointer.entry or job[3] ~= stream.at then
    take_out(stream, position)
    drop_pointer(stream, pointer.entry, pointer.id, job[1] and 'the job waits elsewhere' or 'the job it names is gone')
    return true
  end
  local expired = past_deadline(job[4] or '')
  if not expired and pointer.cost > free_tokens and not (idle and #claimed == 0) then
    return false
  end
  take_out(stream, position)
  if expired then
    end_by_template(load_job(pointer.id), 'expired', ARGV[8], ARGV[9])
    dropped = dropped + 1
  elseif not job[5] then
    end_dead(load_job(pointer.id), 'undecodable', ARGV[12], ARGV[10] .. pack_uint(num(job[6])) .. ARGV[11], '')
    dropped = dropped + 1
  else
    stream.taken[#stream.taken + 1] = pointer.entry
    start(line, pointer, job)
    free_tokens = free_tokens - pointer.cost
  end
  return true
end

local keys = {}
for p = 0, 9 do
  keys[p + 1] = Q .. 'heads:' .. p
end
local there = call('EXISTS', unpack(keys)) -- levels where somebody waits
for p = 9, 0, -1 do
  if there == 0 then
    break
  end
  local heads = { key = keys[p + 1], priority = p }
  if read_order(heads) then
    there = there - 1
  end
  if heads[1] then
    local fair = { key = Q .. 'fair:' .. p, priority = p }
    read_order(fair)
    levels[#levels + 1] = { priority = p, heads = heads, fair = fair }
  end
end

-- The level to serve, the tenant in it, and whether its age decides.
local function next_turn()
  local best, head, effective
  for i = 1, #levels do
    local first = least_of(levels[i].heads)
    local value = first and levels[i].priority + (now - first.score) / aging
    if value and (not best or value > effective) then
      best, head, effective = levels[i], first, value
    end
  end
  if not best then
    return nil
  end
  if effective >= AGED then
    return best, head.tenant, true
  end
  local fairest = least_of(best.fair)
  return best, fairest and fairest.tenant or head.tenant, false
end

local wanted = math.min(max_jobs, free_sequences)
while #claimed < wanted and dropped < MAX_DROPPED do
  local level, tenant, by_age = next_turn()
  if not level then
    break
  end
  local line = line_of(level.priority, tenant)
  local stream, position = choose(line, by_age)
  if not stream then
    passed[line.priority][line.tenant] = true
  elseif take(line, stream, position) then
    advance(level, line)
  else
    break
  end
end

-- Write back what was decided.
for _, line in ipairs(lines) do
  for _, at in ipairs({ 'ready', 'resume' }) do
    if #line[at].taken > 0 then
      call('XDEL', line[at].key, unpack(line[at].taken))
    end
  end
  refresh_head(line.priority, line.tenant)
  if line.started > 0 then
    tally(line.tenant, 'queued', -line.started)
    tally(line.tenant, 'running', line.started)
  end
end
for tenant, delta in pairs(charges) do
  tally(tenant, 'charge', delta)
end
if #claimed > 0 then
  call('ZADD', Q .. 'leases', unpack(leases))
  call('SADD', Q .. 'held:' .. worker, unpack(held))
  if #taken_tags > 0 then
    call('HSET', Q .. 'affinity', unpack(taken_tags))
  end
  count('claimed', #claimed)
  count('waiting_bytes', -started_bytes)
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
