-- Put dead jobs back in line, as new: crashes, errors, checkpoint and result are forgotten. Attempts go on counting, so
-- that a worker still at an old one stays fenced.
--
-- KEYS[1] prefix; ARGV[1] now_ms; then job ids
-- Returns per job 'requeued', 'not_dead', or 'unknown'.
-- Refuses jobs in any other state than dead. The queue's bounds do not apply: the operator decides.
--@include base waiting jobs

local function requeue(id)
  local job = load_job(id)
  if not job then
    return 'unknown'
  end
  local key = Q .. 'job:' .. id
  local more = call('HMGET', key, 'request', 'letter')
  if job.state ~= 'dead' or not more[1] or more[1] == '' then
    return 'not_dead'
  end
  if more[2] then
    call('XDEL', Q .. 'dead', more[2])
  end
  call('DEL', Q .. 'events:' .. id)
  for _, field in ipairs(call('HKEYS', key)) do
    if string.match(field, '^off:') or string.match(field, '^lost:') then
      call('HDEL', key, field)
    end
  end
  call('HDEL', key, 'result', 'tail', 'finished', 'started', 'tokens', 'log_bytes', 'crashes', 'losses', 'errors', 'cancel', 'letter',
    'error_code', 'error_message')
  call('PERSIST', key)
  if job.dedupe ~= '' then
    call('SET', Q .. 'dedupe:' .. job.tenant .. ':' .. job.dedupe, id)
  end
  local entry = stand_in('ready', id, job.priority, job.tenant, now, num(job.input) + num(job.output), job.affinity)
  call('HSET', key, 'state', 'queued', 'owner', '', 'left', '', 'enqueued', now, 'deadline', '', 'charged', 0, 'at',
    'ready', 'entry', entry)
  count('waiting_bytes', request_bytes(job.id))
  count('requeued')
  return 'requeued'
end

local replies, ring = {}, false
for at = 2, #ARGV do
  local reply = requeue(ARGV[at])
  ring = ring or reply == 'requeued'
  replies[#replies + 1] = reply
end
flush()
if ring then
  call('PUBLISH', Q .. 'bell', 'job')
end
return replies
