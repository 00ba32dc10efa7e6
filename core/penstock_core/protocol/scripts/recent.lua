-- Ids of the newest jobs of a tenant, or of all tenants: a page of a bounded index. Read-only.
--
-- KEYS[1] prefix; ARGV[1] now_ms (unused by reads of the clock)
-- ARGV[2] tenant string ('' for all); ARGV[3] limit int; ARGV[4] before string: a job id to go on from, '' from the newest
-- Returns {1, job id, ...}, or {0} where the index does not have that job (any more). A job may be gone by now.
-- Refuses nothing.
--@include base

local key = Q .. 'recent' .. (ARGV[2] == '' and '' or ':' .. ARGV[2])
local stop = -1 -- the newest that is wanted; the index is oldest first
if ARGV[4] ~= '' then
  local found = call('LPOS', key, ARGV[4], 'RANK', -1)
  if not found then
    return { 0 }
  end
  stop = found - 1
end
local reply = { 1 }
if stop ~= -1 or ARGV[4] == '' then
  local start = stop < 0 and -tonumber(ARGV[3]) or math.max(0, stop - tonumber(ARGV[3]) + 1)
  local ids = call('LRANGE', key, start, stop)
  for i = #ids, 1, -1 do
    reply[#reply + 1] = ids[i]
  end
end
return reply
