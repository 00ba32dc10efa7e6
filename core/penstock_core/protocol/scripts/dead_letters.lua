-- Dead letters, newest first. Read-only.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] limit int; ARGV[3] before string: entry id to go on from, '' from the newest
-- Returns {entry id, job id, code, message, t_ms, ...}.
-- Refuses nothing.
--@include base waiting

local from = ARGV[3] == '' and '+' or '(' .. ARGV[3]
local letters = {}
for _, entry in ipairs(call('XREVRANGE', Q .. 'dead', from, '-', 'COUNT', tonumber(ARGV[2]))) do
  letters[#letters + 1] = entry[1]
  for _, name in ipairs({ 'id', 'code', 'message', 't' }) do
    letters[#letters + 1] = entry_field(entry[2], name) or ''
  end
end
return letters
