-- A running job met an error: try again later, or end it as failed. Errors are counted apart from crashes.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] worker string; ARGV[3], ARGV[4] the JobEnded record `cancelled` in two halves around the attempt;
-- ARGV[5], ARGV[6] the same for `expired`; then 7 values per record:
--   id string; attempt int; code string; message string; retryable '1' or '0'; ended bytes (JobEnded, if it is the end);
--   backoff_ms int
-- Returns per record 'delayed' (retry due after the backoff, from the checkpoint), 'failed', 'cancelled' or 'expired'
--   (asked to stop meanwhile, and so ended), or 'fenced'. A repetition after a lost reply gets the first answer.
-- Refuses a stale owner or attempt: 'fenced', and counted.
--@include base waiting jobs

local worker = ARGV[2]

local function delay(job, code, message, backoff_ms)
  leave_worker(job)
  call('HSET', Q .. 'job:' .. job.id, 'state', 'delayed', 'owner', '', 'left', worker .. ':' .. job.attempt, 'errors',
    job.errors, 'charged', job.charged, 'error_code', code, 'error_message', message, 'enqueued', now + backoff_ms)
  call('ZADD', Q .. 'delayed', now + backoff_ms, job.id)
  if job.deadline ~= '' then
    call('ZADD', Q .. 'deadlines', job.deadline, job.id)
  end
  tally(job.tenant, 'delayed', 1)
  count('waiting_bytes', request_bytes(job.id))
  count('retried')
  return 'delayed'
end

local function fail(at)
  local id, attempt = ARGV[at], ARGV[at + 1]
  local job, other = held_job(id, worker, attempt)
  if not job then
    if other and other.attempt == attempt then
      if other.state ~= 'running' and other.owner == worker then
        return other.state
      end
      if other.left == worker .. ':' .. attempt then
        return 'delayed'
      end
    end
    return fence(id, worker, attempt)
  end
  local asked = verdict(job.cancel, job.deadline)
  if asked == 'cancelled' then
    end_by_template(job, asked, ARGV[3], ARGV[4], worker)
    return asked
  end
  if asked == 'expired' then
    end_by_template(job, asked, ARGV[5], ARGV[6], worker)
    return asked
  end
  job.errors = num(job.errors) + 1
  if ARGV[at + 4] == '1' and job.errors <= num(job.retries) then
    return delay(job, ARGV[at + 2], ARGV[at + 3], tonumber(ARGV[at + 6]))
  end
  end_job(job, 'failed', ARGV[at + 5], worker, { 'errors', job.errors })
  return 'failed'
end

local replies = {}
for at = 7, #ARGV, 7 do
  replies[#replies + 1] = fail(at)
end
flush()
return replies
