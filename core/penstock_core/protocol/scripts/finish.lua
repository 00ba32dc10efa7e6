-- End running jobs as their worker says: last chunks, result, terminal event, lease, counts and lifetimes, all at once.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] worker string; then per record 3 values and 2 per chunk:
--   id string; head string: `attempt state prompt_tokens completion_tokens chunks`, the state completed, failed, cancelled
--   or expired; ended bytes (JobEnded); then {head string: `index offset count`; payload bytes} ...
-- Returns per record 'ok' or 'fenced'. A repetition after a lost reply answers 'ok' and changes nothing.
-- Refuses: a stale owner or attempt (counted in `fenced`); chunks that leave a gap (counted in `gaps`; the job runs on).
--@include base waiting jobs log

local worker = ARGV[2]

-- Append the last chunks. Returns the fields to store; nil where a chunk leaves a gap: what came before it is the log's.
local function append_last(job, at, chunks)
  local offsets, fields, appended, gap = {}, {}, 0, false
  for i = at, at + 2 * (chunks - 1), 2 do
    local head = words(ARGV[i])
    local field, offset, n = 'off:' .. head[1], tonumber(head[2]), tonumber(head[3])
    local next_offset = offsets[field] or num(job[field] or call('HGET', Q .. 'job:' .. job.id, field))
    local outcome = append_chunk(job.id, job.client, offset, n, ARGV[i + 1], next_offset)
    if outcome == 'gap' then
      count('gaps')
      gap = true
      break
    end
    if outcome == 'new' then
      appended = appended + n
      offsets[field] = offset + n
    end
  end
  if appended > 0 then
    job.tokens = num(job.tokens) + appended
    count('tokens_out', appended)
    fields[1], fields[2] = 'tokens', text(job.tokens)
    for field, offset in pairs(offsets) do
      fields[#fields + 1] = field
      fields[#fields + 1] = text(offset)
    end
    if gap then
      call('HSET', Q .. 'job:' .. job.id, unpack(fields))
    end
  end
  return not gap and fields or nil
end

local function finish(at, head, chunks)
  local attempt = head[1]
  local job, other = held_job(ARGV[at], worker, attempt, NAMES_TO_END)
  if not job then
    if other and other.owner == worker and other.attempt == attempt then
      return 'ok'
    end
    return fence(ARGV[at], worker, attempt)
  end
  local prompt_tokens, completion_tokens = tonumber(head[3]), tonumber(head[4])
  local fields = append_last(job, at + 3, chunks)
  if not fields then
    return 'fenced'
  end
  end_job(job, head[2], ARGV[at + 2], worker, fields)
  charge_to(job, prompt_tokens + 2 * completion_tokens)
  count('tokens_in', prompt_tokens)
  -- Tokens never streamed (best_of) count when the job ends.
  count('tokens_out', math.max(0, completion_tokens - num(job.tokens)))
  return 'ok'
end

local replies, at, last = {}, 3, #ARGV
while at <= last do
  local head = words(ARGV[at + 1])
  local chunks = tonumber(head[5])
  replies[#replies + 1] = finish(at, head, chunks)
  at = at + 3 + 2 * chunks
end
flush()
return replies
