-- A step of a walk over the queue's retained jobs, in no order. Read-only.
--
-- KEYS[1] prefix; ARGV[1] now_ms (unused by reads of the clock)
-- ARGV[2] cursor string ('0' begins); ARGV[3] count int: how many keys of the server to look at
-- Returns {next cursor ('0': done), job id, ...}; a job may come twice.
-- Refuses nothing.
--@include base

local prefix = Q .. 'job:'
local page = call('SCAN', ARGV[2], 'MATCH', prefix .. '*', 'COUNT', ARGV[3])
local reply = { page[1] }
for _, key in ipairs(page[2]) do
  reply[#reply + 1] = string.sub(key, #prefix + 1)
end
return reply
