-- Where waiting jobs stand: streams `ready` and `resume` per priority and tenant, and per priority the two orders
-- claim chooses by: heads:<p> (tenants by arrival of their oldest job) and fair:<p> (tenants by virtual token count).
-- A tenant is in both exactly while one of its two streams at that priority holds an entry.

-- Queued jobs of a tenant, with what this call has changed so far.
local function queued_of(tenant)
  local entry = tallies[tenant]
  return num(call('HGET', Q .. 'tenant:' .. tenant, 'queued')) + (entry and entry.queued or 0)
end

-- The least virtual count among backlogged tenants; where there is none, that of the last to leave.
local function least_count()
  local found = call('HMGET', Q .. 'stats', 'queued', 'vtc_left')
  local queued, least = num(found[1]), nil
  for _, entry in pairs(tallies) do
    queued = queued + entry.queued
  end
  if queued <= 0 then
    return num(found[2])
  end
  for p = 0, 9 do
    local first = call('ZRANGE', Q .. 'fair:' .. p, 0, 0, 'WITHSCORES')
    if first[2] and (not least or tonumber(first[2]) < least) then
      least = tonumber(first[2])
    end
  end
  return least or num(found[2])
end

-- A tenant begins to wait at a priority. If it was idle it is lifted to the least count (VTC, OSDI 2024, algorithm 2),
-- so that idleness saves up no credit.
local function join_level(priority, tenant)
  settle_charge(tenant, true)
  local score = num(call('ZSCORE', Q .. 'tenants', tenant))
  if queued_of(tenant) <= 0 then
    local least = least_count()
    if score < least then
      score = least
      call('ZADD', Q .. 'tenants', score, tenant)
    end
  end
  call('ZADD', Q .. 'fair:' .. priority, score, tenant)
end

local standing = {} -- level and tenant this call has already seen in its level

-- Whether one more crash would be the end of a job that has crashed before. A worker takes one such job at a time: when
-- it dies of it, no other is buried with it for having been near.
local function on_last_life(job)
  local crashes = num(job.crashes)
  return crashes > 0 and crashes + 1 >= setting('max_crashes')
end

-- Append a pointer to `at` ('ready' or 'resume'); `t` is since when the job waits. Returns the entry id.
-- `last`: the next crash would be the job's end; see on_last_life.
local function stand_in(at, id, priority, tenant, t, cost, tag, last)
  local line = priority .. ':' .. tenant
  local stream, entry = Q .. at .. ':' .. line, nil
  if last then
    entry = call('XADD', stream, '*', 'id', id, 't', t, 'cost', cost, 'tag', tag, 'last', '1')
  else
    entry = call('XADD', stream, '*', 'id', id, 't', t, 'cost', cost, 'tag', tag)
  end
  if at == 'resume' or not standing[line] then
    if call('ZADD', Q .. 'heads:' .. priority, 'NX', t, tenant) == 1 then
      join_level(priority, tenant)
    elseif at == 'resume' then
      call('ZADD', Q .. 'heads:' .. priority, 'XX', 'LT', t, tenant)
    end
    standing[line] = true
  end
  tally(tenant, 'queued', 1)
  return entry
end

-- Value of a field of a stream entry's flat list, or nil.
local function entry_field(fields, name)
  for i = 1, #fields - 1, 2 do
    if fields[i] == name then
      return fields[i + 1]
    end
  end
  return nil
end

-- Since when the first entry of a stream waits, or nil where the stream is empty.
local function first_wait(stream)
  local first = call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
  if not first then
    return nil
  end
  return tonumber(entry_field(first[2], 't')) or now
end

-- Put a tenant's head right after entries were removed.
local function refresh_head(priority, tenant)
  local suffix = priority .. ':' .. tenant
  local ready, resume = first_wait(Q .. 'ready:' .. suffix), first_wait(Q .. 'resume:' .. suffix)
  local head = ready
  if resume and (not ready or resume < ready) then
    head = resume
  end
  if head then
    call('ZADD', Q .. 'heads:' .. priority, head, tenant)
    return
  end
  standing[suffix] = nil
  call('ZREM', Q .. 'heads:' .. priority, tenant)
  call('ZREM', Q .. 'fair:' .. priority, tenant)
  call('DEL', Q .. 'ready:' .. suffix, Q .. 'resume:' .. suffix)
end
