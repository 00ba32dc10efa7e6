-- End running jobs as their worker says: last chunks, result, terminal event, lease, counts and lifetimes, all at once.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] worker string; then per record 7 values and 4 per chunk:
--   id string; attempt int; state string (completed, failed, cancelled or expired); ended bytes (JobEnded);
--   prompt_tokens int; completion_tokens int; chunks int; {index int; offset int; count int; payload bytes} ...
-- Returns per record 'ok' or 'fenced'. A repetition after a lost reply answers 'ok' and changes nothing.
-- Refuses: a stale owner or attempt (counted in `fenced`); chunks that leave a gap (counted in `gaps`; the job runs on).
--@include base waiting jobs log

local worker = ARGV[2]

-- Append the last chunks; returns false where one leaves a gap.
local function append_last(job, at, chunks)
  local key = Q .. 'job:' .. job.id
  local appended = 0
  for i = 0, chunks - 1 do
    local field, payload = 'off:' .. ARGV[at + 4 * i], ARGV[at + 4 * i + 3]
    local offset, n = tonumber(ARGV[at + 4 * i + 1]), tonumber(ARGV[at + 4 * i + 2])
    local outcome = append_chunk(job.id, job.client, offset, n, payload, num(call('HGET', key, field)))
    if outcome == 'gap' then
      count('gaps')
      return false
    end
    if outcome == 'new' then
      appended = appended + n
      call('HSET', key, field, offset + n, 'tokens', num(job.tokens) + appended)
    end
  end
  job.tokens = num(job.tokens) + appended
  count('tokens_out', appended)
  return true
end

local function finish(at, chunks)
  local id, attempt, state, ended = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local prompt_tokens, completion_tokens = tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5])
  local job, other = held_job(id, worker, attempt)
  if not job then
    if other and other.owner == worker and other.attempt == attempt then
      return 'ok'
    end
    count('fenced')
    return 'fenced'
  end
  if not append_last(job, at + 7, chunks) then
    return 'fenced'
  end
  end_job(job, state, ended, worker, { 'prompt_tokens', prompt_tokens, 'completion_tokens', completion_tokens })
  charge_to(job, prompt_tokens + 2 * completion_tokens)
  count('tokens_in', prompt_tokens)
  -- Tokens never streamed (best_of) count when the job ends.
  count('tokens_out', math.max(0, completion_tokens - job.tokens))
  return 'ok'
end

local replies, at = {}, 3
while at <= #ARGV do
  local chunks = tonumber(ARGV[at + 6])
  replies[#replies + 1] = finish(at, chunks)
  at = at + 7 + 4 * chunks
end
flush()
return replies
