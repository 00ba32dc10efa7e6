-- End running jobs as their worker says: last chunks, result, terminal event, lease, counts and lifetimes, all at once.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] worker string; then per record 3 values and 2 per chunk:
--   id string; head string: `attempt state prompt_tokens completion_tokens chunks`, the state completed, failed, cancelled
--   or expired; ended bytes (JobEnded); then {head string: `index offset count`; payload bytes} ...
-- Returns per record 'ok' or 'fenced'. A repetition after a lost reply answers 'ok' and changes nothing.
-- Refuses: a stale owner or attempt (counted in `fenced`); chunks that leave a gap (counted in `gaps`; the job runs on,
--   without any of them).
--@include base waiting jobs log

local worker = ARGV[2]

-- The last chunks that are not the log's already, and the fields to store: `tail` holds them, each behind its length, as
-- an entry of the log would cost more than the rest of a short job. nil where a chunk leaves a gap.
local function last_chunks(job, at, chunks)
  local fresh, tail, offsets, appended = {}, {}, {}, 0
  for i = at, at + 2 * (chunks - 1), 2 do
    local head, payload = words(ARGV[i]), ARGV[i + 1]
    local field, offset, n = 'off:' .. head[1], tonumber(head[2]), tonumber(head[3])
    local next_offset = offsets[field] or num(job[field] or call('HGET', Q .. 'job:' .. job.id, field))
    local doubtful = n == 0 or offset ~= next_offset
    if not (doubtful and job.log_bytes ~= '' and already_appended(Q .. 'events:' .. job.id, payload)) then
      if offset ~= next_offset then
        return nil
      end
      fresh[#fresh + 1] = payload
      tail[#tail + 1] = #payload .. ':'
      tail[#tail + 1] = payload
      appended = appended + n
      offsets[field] = offset + n
    end
  end
  if #fresh == 0 then
    return fresh, {}
  end
  job.tokens = num(job.tokens) + appended
  local fields = { 'tokens', text(job.tokens), 'tail', table.concat(tail) }
  for field, offset in pairs(offsets) do
    fields[#fields + 1] = field
    fields[#fields + 1] = text(offset)
  end
  count('tokens_out', appended)
  return fresh, fields
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
  local fresh, fields = last_chunks(job, at + 3, chunks)
  if not fresh then
    count('gaps')
    return 'fenced'
  end
  for i = 1, #fresh do
    tell(job.id, job.client, fresh[i])
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
