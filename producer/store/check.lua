--[[
check: is this the live code? Compares, then counts what is wrong; the right code is consumed and so works once. Begins
with lengths.lua.

KEYS 1 code          string
     2 attempts      hash    code: fingerprint of the code that the attempts were made at, count: how many
     3 wrong checks  string  count, across codes, of an address and purpose
ARGV 1 given         string
     2 max attempts  int     wrong checks after which a code of the shortest length is dropped
     3 shortest      int     length of a code, in digits
     4 longest       int     likewise
     5 day           ms      life of the wrong checks, from the first
     6 success       int     error code: right, consumed
     7 expired       int     error code: no live code
     8 wrong         int     error code: wrong; the last allowed attempt drops the code

Returns {error code, 1 if a live code was dropped after too many wrong checks else 0}. Attempts belong to one code value: they
end when it is replaced or expires. Wrong checks end with a right one. A value of `wrong checks` that is not a count counts as
missing and is overwritten.
]]
local attempts, shortest, longest = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local SUCCESS, EXPIRED, WRONG = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])

-- A value that is not a string, or is empty, is not a code: as in issue.
local code, wrong = unpack(redis.call('MGET', KEYS[1], KEYS[3]))
wrong = tonumber(wrong)
local life = redis.call('PTTL', KEYS[1])
if not code or code == '' or life <= 0 then
    return { EXPIRED, 0 }
end
if too_short(code, wrong or 0, attempts, shortest, longest) then
    redis.call('DEL', KEYS[1], KEYS[2])
    return { EXPIRED, 1 }
end

-- Digests have one length, and where they differ reveals nothing; every byte is compared all the same.
local real, given = redis.sha1hex(code), redis.sha1hex(ARGV[1])
local differ = 0
for i = 1, #real do
    differ = bit.bor(differ, bit.bxor(string.byte(real, i), string.byte(given, i)))
end
if differ == 0 then
    redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
    return { SUCCESS, 0 }
end

if redis.call('HGET', KEYS[2], 'code') ~= real then
    redis.call('DEL', KEYS[2])
    redis.call('HSET', KEYS[2], 'code', real)
end
local attempt = redis.call('HINCRBY', KEYS[2], 'count', 1)
redis.call('PEXPIRE', KEYS[2], life)
if wrong and redis.call('PTTL', KEYS[3]) > 0 then
    wrong = redis.call('INCR', KEYS[3])
else
    wrong = 1
    redis.call('SET', KEYS[3], wrong, 'PX', ARGV[5])
end
local more_digits = math.min(math.max(#code, shortest), longest) - shortest
if attempt >= attempts * 10 ^ more_digits or too_short(code, wrong, attempts, shortest, longest) then
    redis.call('DEL', KEYS[1], KEYS[2])
    return { WRONG, 1 }
end
return { WRONG, 0 }
