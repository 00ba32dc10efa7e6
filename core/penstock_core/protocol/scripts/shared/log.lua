-- What publish and finish share: the heads of records, and how a repeated chunk is known.

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
