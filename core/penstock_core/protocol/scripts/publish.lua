-- Append tokens to the logs of running jobs and push them to subscribers: one call per engine step for all sequences.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] worker string; ARGV[3], ARGV[4] the JobEnded record `log_full` in two halves around the
--   attempt; then 3 values per record:
--   id string; head string: `attempt index offset count` (choice, tokens); payload bytes (TokenChunk)
-- Returns per record 'ok', 'cancelled' or 'expired' (appended all the same; stop and finish it so), or 'fenced'.
-- Refuses: a stale owner or attempt (counted in `fenced`); an offset that is not the next one (counted in `gaps`); a log
--   over max_log_bytes (the job ends as failed). All three answer 'fenced': drop the sequence.
--   A chunk that is already the log's is answered as if new, so a call may be repeated as it was.
--@include base waiting jobs log

local worker, max_log_bytes = ARGV[2], setting('max_log_bytes')

-- Append a chunk of `n` tokens at `offset`; `next_offset` is what the hash has for its choice.
-- Returns 'new', 'repeated' or 'gap'. Chunks without tokens cannot be told from repetitions by offset alone.
local function append_chunk(id, client, offset, n, payload, next_offset)
  local log = Q .. 'events:' .. id
  if n == 0 or offset ~= next_offset then
    if already_appended(log, payload) then
      return 'repeated'
    end
    if offset ~= next_offset then
      return 'gap'
    end
  end
  call('XADD', log, '*', 'c', payload)
  tell(id, client, payload)
  return 'new'
end

local function publish(at)
  local id, head, payload = ARGV[at], words(ARGV[at + 1]), ARGV[at + 2]
  local attempt, offset, n = head[1], tonumber(head[3]), tonumber(head[4])
  local key, field = Q .. 'job:' .. id, 'off:' .. head[2]
  local job = call('HMGET', key, 'state', 'owner', 'attempt', 'client', 'cancel', 'deadline', 'log_bytes', 'tokens', field)
  if job[1] ~= 'running' or job[2] ~= worker or job[3] ~= attempt then
    return fence(id, worker, attempt)
  end
  local log_bytes = num(job[7]) + #payload
  if max_log_bytes > 0 and log_bytes > max_log_bytes then
    end_by_template(load_job(id), 'failed', ARGV[3], ARGV[4])
    return 'fenced'
  end
  local appended = append_chunk(id, job[4] or '', offset, n, payload, num(job[9]))
  if appended == 'gap' then
    count('gaps')
    return 'fenced'
  end
  if appended == 'new' then
    call('HSET', key, field, text(offset + n), 'tokens', text(num(job[8]) + n), 'log_bytes', text(log_bytes))
    count('tokens_out', n)
  end
  return verdict(job[5], job[6])
end

local replies = {}
for at = 5, #ARGV, 3 do
  replies[#replies + 1] = publish(at)
end
flush()
return replies
