-- Set the operator's bounds of the queue, or take them back to their defaults.
--
-- KEYS[1] prefix; ARGV[1] now_ms; then pairs: field string; value int, or '' for the default
-- Returns the whole `config` hash as a flat list (no pairs: only read it).
-- Refuses nothing; the wrapper knows the fields.
--@include base

for at = 2, #ARGV, 2 do
  if ARGV[at + 1] == '' then
    call('HDEL', Q .. 'config', ARGV[at])
  else
    call('HSET', Q .. 'config', ARGV[at], ARGV[at + 1])
  end
end
return call('HGETALL', Q .. 'config')
