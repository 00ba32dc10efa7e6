-- Ids of the newest jobs of a tenant, or of all tenants: a page of a bounded index. Read-only.
--
-- KEYS[1] prefix; ARGV[1] now_ms (unused by reads of the clock)
-- ARGV[2] tenant string ('' for all); ARGV[3] limit int; ARGV[4] before string: a job id to go on from, '' from the newest
-- Returns {1, job id, ...}, or {0} where the index does not have that job (any more). A job may be gone by now.
-- Refuses nothing.
--@include base

local key = Q .. 'recent' .. (ARGV[2] == '' and '' or ':' .. ARGV[2])
local first = 0
if ARGV[4] ~= '' then
  local rank = call('ZREVRANK', key, ARGV[4])
  if not rank then
    return { 0 }
  end
  first = rank + 1
end
local reply = { 1 }
for _, id in ipairs(call('ZREVRANGE', key, first, first + tonumber(ARGV[3]) - 1)) do
  reply[#reply + 1] = id
end
return reply
