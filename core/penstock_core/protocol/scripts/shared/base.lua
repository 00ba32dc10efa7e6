-- The beginning of every script: the queue's prefix, the clock, the operator's settings, and what a call accumulates
-- (counters, tenants' counts, events for clients) and writes once, in flush(), however many jobs it handled.
--
-- KEYS[1] prefix  string  `penstock:{q}:`, what every key of the queue starts with; its braces fix the Cluster slot
-- ARGV[1] now_ms  int     the clock in milliseconds since 1970; 0: the server's own (tests pass their own)

local call = redis.call
local Q = KEYS[1]
local now = tonumber(ARGV[1])
if now == 0 then
  local time = call('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local now_text = string.format('%.0f', now) -- cheaper for redis.call than the number

local function num(value)
  return tonumber(value) or 0
end

-- An integer as text: a number given to redis.call is printed as a float, which costs more than the rest of its command.
local texts = {}
local function text(n)
  local known = texts[n]
  if not known then
    known = string.format('%.0f', n)
    texts[n] = known
  end
  return known
end

-- Settings an operator can override in the hash `config`; 0 means no limit. QueueConfig in config.py says the same.
local DEFAULTS = {
  max_waiting_jobs = 100000,
  max_waiting_bytes = 1073741824,
  max_queued = 0,
  max_running = 0,
  tokens_per_minute = 0,
  aging_interval_ms = 60000,
  patience_ms = 100,
  max_log_bytes = 67108864,
  max_crashes = 3,
  max_dead = 10000,
  dead_ttl_ms = 604800000,
}

local configured -- whether the operator has set anything at all; few have
local function is_configured()
  if configured == nil then
    configured = call('EXISTS', Q .. 'config') == 1
  end
  return configured
end

local function setting(name)
  return is_configured() and tonumber(call('HGET', Q .. 'config', name)) or DEFAULTS[name]
end

-- A tenant's own limit (`max_running:<tenant>`), else the one for all tenants.
local function tenant_limit(name, tenant)
  if not is_configured() then
    return DEFAULTS[name]
  end
  local found = call('HMGET', Q .. 'config', name .. ':' .. tenant, name)
  return tonumber(found[1]) or tonumber(found[2]) or DEFAULTS[name]
end

local RATE_WINDOW_MS = 30000 -- time constant of the departure rate in `stats`

local counts = {}  -- field of `stats` -> change
local tallies = {} -- tenant -> {queued, delayed, running, charge}: changes
local frames = {}  -- client -> pieces of packed [job id, event] pairs, and how many pairs they make
local leaving = {} -- worker -> ids of jobs it lets go

local function count(name, by)
  counts[name] = (counts[name] or 0) + (by or 1)
end

local function tally(tenant, field, by)
  local entry = tallies[tenant]
  if not entry then
    entry = { queued = 0, delayed = 0, running = 0, charge = 0 }
    tallies[tenant] = entry
  end
  entry[field] = entry[field] + by
end

local char, floor = string.char, math.floor

local function be32(n)
  return char(floor(n / 16777216) % 256, floor(n / 65536) % 256, floor(n / 256) % 256, n % 256)
end

-- msgpack of a small unsigned integer: the attempt inside a prebuilt terminal event.
local function pack_uint(n)
  if n < 128 then
    return char(n)
  end
  return '\206' .. be32(n)
end

-- msgpack of a string below 64 KiB: the message inside a terminal event.
local function pack_text(text)
  return '\218' .. char(floor(#text / 256), #text % 256) .. text
end

local id_heads, event_heads = {}, {} -- length -> what msgpack puts before a pair and an id, before an event of that length

-- Push one event of a job: on its own channel now, to its client in one frame at the end of the call.
local function tell(id, client, event)
  call('PUBLISH', Q .. 'channel:' .. id, event)
  if client ~= '' then
    local frame = frames[client]
    if not frame then
      frame = { pairs = 0, pieces = 0 }
      frames[client] = frame
    end
    local id_head, event_head = id_heads[#id], event_heads[#event]
    if not id_head then
      id_head = '\146\217' .. char(#id)
      id_heads[#id] = id_head
    end
    if not event_head then
      event_head = '\198' .. be32(#event)
      event_heads[#event] = event_head
    end
    local at = frame.pieces
    frame[at + 1], frame[at + 2], frame[at + 3], frame[at + 4] = id_head, id, event_head, event
    frame.pairs, frame.pieces = frame.pairs + 1, at + 4
  end
end

-- Add pending virtual tokens to a tenant's count and, unless none of its jobs waits, to its place in every level.
local function settle_charge(tenant, waits)
  local entry = tallies[tenant]
  if entry and entry.charge ~= 0 then
    local score = call('ZINCRBY', Q .. 'tenants', text(entry.charge), tenant)
    entry.charge = 0
    if waits then
      for p = 0, 9 do
        call('ZADD', Q .. 'fair:' .. p, 'XX', score, tenant)
      end
    end
  end
end

local IDLE_TENANT_MS = 3600000

local function flush_tenant(tenant, entry)
  if entry.queued == 0 and entry.delayed == 0 and entry.running == 0 then
    settle_charge(tenant, true)
    return
  end
  local key = Q .. 'tenant:' .. tenant
  local old = call('HMGET', key, 'queued', 'delayed', 'running')
  local queued, delayed, running = num(old[1]) + entry.queued, num(old[2]) + entry.delayed, num(old[3]) + entry.running
  settle_charge(tenant, queued > 0)
  call('HSET', key, 'queued', text(queued), 'delayed', text(delayed), 'running', text(running))
  if queued == 0 and entry.queued < 0 then
    -- VTC: where nobody waits, a tenant that comes back is lifted to the count of the one who left last.
    call('HSET', Q .. 'stats', 'vtc_left', call('ZSCORE', Q .. 'tenants', tenant) or '0')
  end
  if queued + delayed + running == 0 then
    call('PEXPIRE', key, text(IDLE_TENANT_MS))
  elseif num(old[1]) + num(old[2]) + num(old[3]) == 0 then
    call('PERSIST', key)
  end
  count('queued', entry.queued)
  count('delayed', entry.delayed)
  count('running', entry.running)
end

local function flush()
  for worker, ids in pairs(leaving) do
    for first = 1, #ids, 1000 do -- Lua's stack bounds what unpack can give
      local last = math.min(first + 999, #ids)
      call('ZREM', Q .. 'leases', unpack(ids, first, last))
      call('SREM', Q .. 'held:' .. worker, unpack(ids, first, last))
    end
  end
  for tenant, entry in pairs(tallies) do
    flush_tenant(tenant, entry)
  end
  local names, n = {}, 0
  for name, by in pairs(counts) do
    if by ~= 0 then
      n = n + 1
      names[n] = name
    end
  end
  if n > 0 then -- read and write all at once: half of what an HINCRBY for each costs
    local old, values = call('HMGET', Q .. 'stats', unpack(names)), {}
    for i = 1, n do
      values[2 * i - 1], values[2 * i] = names[i], text(num(old[i]) + counts[names[i]])
    end
    call('HSET', Q .. 'stats', unpack(values))
  end
  for client, frame in pairs(frames) do
    call('PUBLISH', Q .. 'client:' .. client, '\221' .. be32(frame.pairs) .. table.concat(frame))
  end
  counts, tallies, frames, leaving = {}, {}, {}, {}
end
