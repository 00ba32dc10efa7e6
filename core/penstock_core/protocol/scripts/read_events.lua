-- A job's events after one of them. Read-only.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] job id; ARGV[3] after string: id of the last event seen, '' from the beginning; ARGV[4] limit int
-- Returns {state, {id, event bytes, ...}}: the log's entries, then, of a job that has ended, the chunks that came with its
--   end and the terminal record, with ids `end-1`, `end-2`, ... {} where no such job.
-- Refuses nothing.
--@include base

local id, after, limit = ARGV[2], ARGV[3], tonumber(ARGV[4])
local job = call('HMGET', Q .. 'job:' .. id, 'state', 'result', 'tail')
if not job[1] then
  return {}
end
local events = {}
local seen = tonumber(string.match(after, '^end%-(%d+)$')) -- of those that are not in the log
if not seen then
  seen = 0
  for _, entry in ipairs(call('XRANGE', Q .. 'events:' .. id, after == '' and '-' or '(' .. after, '+', 'COUNT', limit)) do
    if entry[2][1] == 'c' then -- what marked the end before there was a tail is none
      events[#events + 1] = entry[1]
      events[#events + 1] = entry[2][2]
    end
  end
end

local at = 0
local function add(event)
  at = at + 1
  if at > seen and #events < 2 * limit then
    events[#events + 1] = 'end-' .. at
    events[#events + 1] = event
  end
end

if job[2] then
  local tail, from = job[3] or '', 1
  while from <= #tail do
    local _, colon, length = string.find(tail, '^(%d+):', from)
    add(string.sub(tail, colon + 1, colon + tonumber(length)))
    from = colon + tonumber(length) + 1
  end
  add(job[2])
end
return { job[1], events }
