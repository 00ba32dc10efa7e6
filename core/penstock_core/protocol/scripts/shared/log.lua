-- Appending to the token log, at exactly the offset that is next, once.

local heads = {} -- text -> its words; records of a call are often alike

-- The words of a record's head. Each argument of a script costs both sides more than the numbers in it.
local function words(head)
  local known = heads[head]
  if not known then
    known = {}
    for word in string.gmatch(head, '%S+') do
      known[#known + 1] = word
    end
    heads[head] = known
  end
  return known
end

local RECENT = 256 -- log entries searched for a repeated chunk; more than one call can append to a job

-- Whether the log's newest entries contain this very chunk: the call is a repetition whose first reply was lost.
local function already_appended(log, payload)
  local recent = call('XREVRANGE', log, '+', '-', 'COUNT', RECENT)
  for i = 1, #recent do
    if recent[i][2][2] == payload then
      return true
    end
  end
  return false
end

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
