--[[
check: is this the live code? Counts the attempt, then compares; the right code is consumed and so works once.

KEYS 1 code          string
     2 attempts      hash    code: fingerprint of the code that the attempts were made at, count: how many
ARGV 1 given         string
     2 max attempts  int     wrong checks after which the code is dropped
     3 success       int     error code: right, consumed
     4 expired       int     error code: no live code
     5 wrong         int     error code: wrong; the last allowed attempt drops the code

Returns one of the three error codes. Attempts belong to one code value: they end when it is replaced or expires.
]]
-- A value that is not a string, or is empty, is not a code: as in issue.
local code = redis.call('MGET', KEYS[1])[1]
local life = redis.call('PTTL', KEYS[1])
if not code or code == '' or life <= 0 then
    return tonumber(ARGV[4])
end
local real, given = redis.sha1hex(code), redis.sha1hex(ARGV[1])
if redis.call('HGET', KEYS[2], 'code') ~= real then
    redis.call('DEL', KEYS[2])
    redis.call('HSET', KEYS[2], 'code', real)
end
local attempt = redis.call('HINCRBY', KEYS[2], 'count', 1)
redis.call('PEXPIRE', KEYS[2], life)

-- Digests have one length, and where they differ reveals nothing; every byte is compared all the same.
local differ = 0
for i = 1, #real do
    differ = bit.bor(differ, bit.bxor(string.byte(real, i), string.byte(given, i)))
end
if differ == 0 then
    redis.call('DEL', KEYS[1], KEYS[2])
    return tonumber(ARGV[3])
end
if attempt >= tonumber(ARGV[2]) then
    redis.call('DEL', KEYS[1], KEYS[2])
end
return tonumber(ARGV[5])
