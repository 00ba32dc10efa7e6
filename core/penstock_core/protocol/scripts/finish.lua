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

-- Append the last chunks. Returns the fields to store, or nil where a chunk leaves a gap: then nothing is appended.
local function append_last(job, at, chunks)
  local offsets, appended = {}, 0
  for i = 0, chunks - 1 do
    local field = 'off:' .. ARGV[at + 4 * i]
    local offset, n, payload = tonumber(ARGV[at + 4 * i + 1]), tonumber(ARGV[at + 4 * i + 2]), ARGV[at + 4 * i + 3]
    local next_offset = offsets[field] or num(job[field] or call('HGET', Q .. 'job:' .. job.id, field))
    local outcome = append_chunk(job.id, job.client, offset, n, payload, next_offset)
    if outcome == 'gap' then
      count('gaps')
      return nil
    end
    if outcome == 'new' then
      appended = appended + n
      offsets[field] = offset + n
    end
  end
  if appended == 0 then
    return {}
  end
  job.tokens = num(job.tokens) + appended
  count('tokens_out', appended)
  local fields = { 'tokens', job.tokens }
  for field, offset in pairs(offsets) do
    fields[#fields + 1] = field
    fields[#fields + 1] = offset
  end
  return fields
end

local function finish(at, chunks)
  local id, attempt, state, ended = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local prompt_tokens, completion_tokens = tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5])
  local job, other = held_job(id, worker, attempt, NAMES_TO_END)
  if not job then
    if other and other.owner == worker and other.attempt == attempt then
      return 'ok'
    end
    return fence(id, worker, attempt)
  end
  local fields = append_last(job, at + 7, chunks)
  if not fields then
    return 'fenced'
  end
  end_job(job, state, ended, worker, fields)
  charge_to(job, prompt_tokens + 2 * completion_tokens)
  count('tokens_in', prompt_tokens)
  -- Tokens never streamed (best_of) count when the job ends.
  count('tokens_out', math.max(0, completion_tokens - num(job.tokens)))
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
