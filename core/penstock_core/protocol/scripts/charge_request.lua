-- One more request of an API key: a token bucket of one minute's worth, which all gateways of the queue share.
--
-- KEYS[1] prefix; ARGV[1] now_ms
-- ARGV[2] key         string  fingerprint of the API key
-- ARGV[3] per_minute  int     requests the key may make a minute
-- Returns 0 where the request passes, else the milliseconds until one would.
-- Refuses nothing but the request. A refused one is not charged.
--@include base

local key, rate = Q .. 'rate:' .. ARGV[2], tonumber(ARGV[3])
local state = call('HMGET', key, 'left', 'at')
local refilled = rate * math.max(0, now - num(state[2])) / 60000
local left = math.min(rate, (tonumber(state[1]) or rate) + refilled)
if left < 1 then
  return math.ceil((1 - left) * 60000 / rate)
end
call('HSET', key, 'left', string.format('%.9f', left - 1), 'at', now_text)
call('PEXPIRE', key, 60000) -- a bucket nobody took from for a minute is full, as one that is not there
return 0
