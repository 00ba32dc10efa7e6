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

-- Append the last chunks. Returns the fields to store; nil where a chunk leaves a gap: what came before it is the log's.
local function append_last(job, at, chunks)
  local offsets, fields, appended, gap = {}, {}, 0, false
  for i = at, at + 4 * (chunks - 1), 4 do
    local index, offset, n = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
    local field = index == '0' and 'off:0' or 'off:' .. index
    local next_offset = offsets[field] or num(job[field] or call('HGET', Q .. 'job:' .. job.id, field))
    local outcome = append_chunk(job.id, job.client, offset, n, ARGV[i + 3], next_offset)
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

local function finish(at, chunks)
  local attempt = ARGV[at + 1]
  local job, other = held_job(ARGV[at], worker, attempt, NAMES_TO_END)
  if not job then
    if other and other.owner == worker and other.attempt == attempt then
      return 'ok'
    end
    return fence(ARGV[at], worker, attempt)
  end
  local prompt_tokens, completion_tokens = tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5])
  local fields = append_last(job, at + 7, chunks)
  if not fields then
    return 'fenced'
  end
  end_job(job, ARGV[at + 2], ARGV[at + 3], worker, fields)
  charge_to(job, prompt_tokens + 2 * completion_tokens)
  count('tokens_in', prompt_tokens)
  -- Tokens never streamed (best_of) count when the job ends.
  count('tokens_out', math.max(0, completion_tokens - num(job.tokens)))
  return 'ok'
end

local replies, at, last = {}, 3, #ARGV
while at <= last do
  local chunks = tonumber(ARGV[at + 6])
  replies[#replies + 1] = finish(at, chunks)
  at = at + 7 + 4 * chunks
end
flush()
return replies
