--[[
check: is this the live code? Counts first, then compares, and consumes on success: the right code works once.

KEYS 1 code       string
     2 attempts   hash    code: fingerprint of the code they were made at, count: how many
ARGV 1 given      string
     2 most       int     wrong checks after which the code is dropped

Returns 0 (right, consumed) | 1003 (no live code) | 1004 (wrong; the last that is allowed drops the code).
Attempts belong to one code value: they are gone when it is replaced, and live no longer than it.
]]
-- What is no string, or an empty one, is no code, as for issue.
local code = redis.call('MGET', KEYS[1])[1]
local life = redis.call('PTTL', KEYS[1])
if not code or code == '' or life <= 0 then
    return 1003
end
local real, given = redis.sha1hex(code), redis.sha1hex(ARGV[1])
if redis.call('HGET', KEYS[2], 'code') ~= real then
    redis.call('DEL', KEYS[2])
    redis.call('HSET', KEYS[2], 'code', real)
end
local attempt = redis.call('HINCRBY', KEYS[2], 'count', 1)
redis.call('PEXPIRE', KEYS[2], life)

-- Digests have one length and reveal nothing by the place where they differ; every byte is looked at all the same.
local differ = 0
for i = 1, #real do
    differ = bit.bor(differ, bit.bxor(string.byte(real, i), string.byte(given, i)))
end
if differ == 0 then
    redis.call('DEL', KEYS[1], KEYS[2])
    return 0
end
if attempt >= tonumber(ARGV[2]) then
    redis.call('DEL', KEYS[1], KEYS[2])
end
return 1004
