-- Accept jobs: dedupe, admission, job hash, pointer; or refuse each for itself.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] client  string  whose channel gets the events; '' for none
-- ARGV[3] count   int     number of jobs; then 7 values per job:
--   id string; request bytes; options string; affinity string; idempotency key string ('' none); metadata bytes;
--   traceparent string. The options are nine values with a space between: priority int; tenant string; input int, output
--   int (token estimates); deadline_ms int (from now; 0 none); delay_ms int (from now); not_before_ms int (absolute;
--   0 none); max_retries int; ttl_ms int
-- Returns per job {status, ...}: {'accepted'}, {'duplicate', existing id},
--   {'full', limit name, current value, limit, retry_after_ms}.
-- Refuses: over max_waiting_jobs, max_waiting_bytes, or the tenant's max_queued or tokens_per_minute.
--@include base waiting

local client, n = ARGV[2], tonumber(ARGV[3])
local FIELDS = 7

local found = call('HMGET', Q .. 'stats', 'queued', 'delayed', 'waiting_bytes', 'rate_count', 'rate_at')
local waiting, bytes = num(found[1]) + num(found[2]), num(found[3])
local max_jobs, max_bytes = setting('max_waiting_jobs'), setting('max_waiting_bytes')

local MAX_RETRY_MS, MIN_RETRY_MS = 60000, 100
local rate = num(found[4]) * math.exp(-math.max(0, now - num(found[5])) / RATE_WINDOW_MS) / RATE_WINDOW_MS
local refused = 0

-- When room may come: the k-th refused job needs k of the recent endings.
local function retry_after_ms()
  refused = refused + 1
  if rate <= 0 then
    return 1000
  end
  return math.ceil(math.min(MAX_RETRY_MS, math.max(MIN_RETRY_MS, refused / rate)))
end

local limits = {} -- tenant -> its limits, count and token bucket
local accepted = {} -- ids, in order
local accepted_of = {} -- tenant -> the same of its own
local accepted_bytes, ring = 0, false

local function limits_of(tenant)
  local t = limits[tenant]
  if not t then
    local state = call('HMGET', Q .. 'tenant:' .. tenant, 'queued', 'delayed', 'bucket', 'bucket_at')
    t = {
      waiting = num(state[1]) + num(state[2]),
      max_queued = tenant_limit('max_queued', tenant),
      rate = tenant_limit('tokens_per_minute', tenant),
    }
    if t.rate > 0 then
      local elapsed = math.max(0, now - num(state[4]))
      t.bucket = math.min(t.rate, (tonumber(state[3]) or t.rate) + t.rate * elapsed / 60000)
    end
    limits[tenant] = t
  end
  return t
end

-- Why there is no room for the job, as the reply, or nil. The token bucket holds one minute's worth; a job that costs
-- more than that goes through when the bucket is full and leaves it in debt.
local function no_room(tenant, cost, size)
  if max_jobs > 0 and waiting >= max_jobs then
    return { 'full', 'max_waiting_jobs', waiting, max_jobs, retry_after_ms() }
  end
  if max_bytes > 0 and bytes + size > max_bytes then
    return { 'full', 'max_waiting_bytes', bytes, max_bytes, retry_after_ms() }
  end
  local t = limits_of(tenant)
  if t.max_queued > 0 and t.waiting >= t.max_queued then
    return { 'full', 'max_queued', t.waiting, t.max_queued, retry_after_ms() }
  end
  if t.rate > 0 then
    local missing = math.min(cost, t.rate) - t.bucket
    if missing > 0 then
      return { 'full', 'tokens_per_minute', floor(t.rate - t.bucket), t.rate, math.ceil(missing * 60000 / t.rate) }
    end
    t.bucket = t.bucket - cost
    t.charged = true
  end
  t.waiting = t.waiting + 1
  waiting, bytes = waiting + 1, bytes + size
  return nil
end

local OPTIONS = '^(%d) (%S+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$'
local options = {} -- their text -> what it says; jobs of a call are often alike

local function read_options(line)
  local o = options[line]
  if not o then
    local priority, tenant, input, output, deadline, delay, not_before, retries, ttl = string.match(line, OPTIONS)
    if not priority then
      error('the options of a job are nine values, got: ' .. line)
    end
    o = {
      priority = priority, tenant = tenant, input = input, output = output, cost = tonumber(input) + tonumber(output),
      deadline_ms = tonumber(deadline), due = math.max(now + tonumber(delay), tonumber(not_before)), retries = retries,
      ttl = ttl,
    }
    options[line] = o
  end
  return o
end

local function accept(at, id, key, o)
  local request, affinity, dedupe = ARGV[at + 1], ARGV[at + 3], ARGV[at + 4]
  local priority, tenant, due = o.priority, o.tenant, o.due
  local state, entry = 'queued', ''
  if due > now then
    state = 'delayed'
    call('ZADD', Q .. 'delayed', due, id)
    tally(tenant, 'delayed', 1)
  else
    entry = stand_in('ready', id, priority, tenant, now_text, text(o.cost), affinity)
  end
  local fields = {
    'state', state, 'request', request, 'priority', priority, 'tenant', tenant, 'submitted', now_text, 'input', o.input,
    'output', o.output, 'retries', o.retries, 'ttl', o.ttl, 'at', 'ready', 'entry', entry, 'client', client,
    'affinity', affinity,
  }
  local n = #fields
  local function set(name, value)
    fields[n + 1], fields[n + 2] = name, value
    n = n + 2
  end
  if due > now then
    set('enqueued', text(due))
  end
  if o.deadline_ms > 0 then
    local deadline = text(now + o.deadline_ms)
    call('ZADD', Q .. 'deadlines', deadline, id)
    set('deadline', deadline)
  end
  if dedupe ~= '' then
    call('SET', Q .. 'dedupe:' .. tenant .. ':' .. dedupe, id)
    set('dedupe', dedupe)
  end
  if ARGV[at + 5] ~= '' then
    set('metadata', ARGV[at + 5])
  end
  if ARGV[at + 6] ~= '' then
    set('trace', ARGV[at + 6])
  end
  call('HSET', key, unpack(fields, 1, n))
  ring = ring or state == 'queued'
  accepted_bytes = accepted_bytes + #request
  local own = accepted_of[tenant]
  if not own then
    own = {}
    accepted_of[tenant] = own
  end
  own[#own + 1], accepted[#accepted + 1] = id, id
end

-- The indexes that a listing reads: the newest jobs of a tenant and of all, bounded in number and in time.
local RECENT_OF_TENANT, RECENT_OF_ALL, RECENT_MS = 1000, 10000, 31 * 86400000
local PART = 1000 -- Lua's stack bounds what unpack can give

local function remember(key, ids, most)
  local length
  for first = 1, #ids, PART do
    length = call('RPUSH', key, unpack(ids, first, math.min(first + PART - 1, #ids)))
  end
  if length > most then
    call('LTRIM', key, -most, -1)
  end
  call('PEXPIRE', key, RECENT_MS)
end

local keys, known = {}, 0 -- of the jobs, and how many of them exist
for i = 1, n do
  keys[i] = Q .. 'job:' .. ARGV[4 + (i - 1) * FIELDS]
end
for first = 1, n, PART do
  known = known + call('EXISTS', unpack(keys, first, math.min(first + PART - 1, n)))
end

local ACCEPTED = { 'accepted' }
local seen = {} -- ids accepted by this call

local function submit(at, key)
  local id, dedupe, o = ARGV[at], ARGV[at + 4], read_options(ARGV[at + 2])
  if dedupe ~= '' then
    local existing = call('GET', Q .. 'dedupe:' .. o.tenant .. ':' .. dedupe)
    if existing then
      count('duplicates')
      return { 'duplicate', existing }
    end
  end
  if seen[id] or (known > 0 and call('EXISTS', key) == 1) then
    count('duplicates')
    return { 'duplicate', id }
  end
  local refusal = no_room(o.tenant, o.cost, #ARGV[at + 1])
  if refusal then
    count('refused')
    return refusal
  end
  accept(at, id, key, o)
  seen[id] = true
  return ACCEPTED
end

local replies = {}
for i = 1, n do
  replies[i] = submit(4 + (i - 1) * FIELDS, keys[i])
end
if #accepted > 0 then
  count('submitted', #accepted)
  count('waiting_bytes', accepted_bytes)
  remember(Q .. 'recent', accepted, RECENT_OF_ALL)
  for tenant, own in pairs(accepted_of) do
    remember(Q .. 'recent:' .. tenant, own, RECENT_OF_TENANT)
  end
end
flush()
for tenant, t in pairs(limits) do
  if t.charged then
    call('HSET', Q .. 'tenant:' .. tenant, 'bucket', string.format('%.3f', t.bucket), 'bucket_at', now)
  end
end
if ring then
  call('PUBLISH', Q .. 'bell', 'job')
end
return replies
