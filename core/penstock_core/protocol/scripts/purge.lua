-- Delete dead jobs with all they left, and their letters.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] limit int: with no ids, at most so many of the oldest letters; then job ids
-- Returns the number of letters and jobs removed.
-- Refuses jobs in any other state than dead: they are left alone.
--@include base waiting jobs

local purged = 0

local function purge_job(id)
  local key = Q .. 'job:' .. id
  local job = call('HMGET', key, 'state', 'letter', 'dedupe', 'tenant')
  if job[1] ~= 'dead' then
    return false
  end
  if job[2] then
    call('XDEL', Q .. 'dead', job[2])
  end
  if job[3] and job[3] ~= '' then
    call('DEL', Q .. 'dedupe:' .. job[4] .. ':' .. job[3])
  end
  call('DEL', key, Q .. 'events:' .. id)
  return true
end

if #ARGV > 2 then
  for at = 3, #ARGV do
    if purge_job(ARGV[at]) then
      purged = purged + 1
    end
  end
elseif tonumber(ARGV[2]) > 0 then
  for _, letter in ipairs(call('XRANGE', Q .. 'dead', '-', '+', 'COUNT', tonumber(ARGV[2]))) do
    purge_job(entry_field(letter[2], 'id') or '')
    call('XDEL', Q .. 'dead', letter[1])
    purged = purged + 1
  end
end
if call('XLEN', Q .. 'dead') == 0 then
  call('DEL', Q .. 'dead')
end
return purged
