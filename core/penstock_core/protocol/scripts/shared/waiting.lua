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
  local least
  for p = 0, 9 do
    local first = call('ZRANGE', Q .. 'fair:' .. p, 0, 0, 'WITHSCORES')
    if first[2] and (not least or tonumber(first[2]) < least) then
      least = tonumber(first[2])
    end
  end
  return least or num(call('HGET', Q .. 'stats', 'vtc_left'))
end

-- A tenant begins to wait at a priority. If it was idle it is lifted to the least count (VTC, OSDI 2024, algorithm 2),
-- so that idleness saves up no credit.
local function join_level(priority, tenant)
  settle_charge(tenant)
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

-- Append a pointer to `at` ('ready' or 'resume'); `t` is since when the job waits. Returns the entry id.
local function stand_in(at, id, priority, tenant, t, cost, tag)
  local line = priority .. ':' .. tenant
  local entry = call('XADD', Q .. at .. ':' .. line, '*', 'id', id, 't', t, 'cost', cost, 'tag', tag)
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
