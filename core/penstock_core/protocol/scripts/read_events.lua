-- A job's events after a log entry. Read-only.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] job id; ARGV[3] after string: entry id of the last event seen, '' from the beginning; ARGV[4] limit int
-- Returns {state, {entry id, event bytes, ...}}; the terminal record stands where its mark is. {} where no such job.
-- Refuses nothing.
--@include base

local id, after = ARGV[2], ARGV[3]
local job = call('HMGET', Q .. 'job:' .. id, 'state', 'result')
if not job[1] then
  return {}
end
local from = after == '' and '-' or '(' .. after
local events = {}
for _, entry in ipairs(call('XRANGE', Q .. 'events:' .. id, from, '+', 'COUNT', tonumber(ARGV[4]))) do
  events[#events + 1] = entry[1]
  events[#events + 1] = entry[2][1] == 'c' and entry[2][2] or job[2]
end
return { job[1], events }
