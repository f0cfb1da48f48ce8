--[[
ack: these messages are done. On one server, a message whose reply was refused just before, in the same trip, stays.

KEYS 1 unacked     hash
     2 index       zset
ARGV 1 broker      int    number of its database
     2 results     int    number of theirs; '' if the replies are known to be stored
     3 ...                tag, reply key, tag, reply key ...

Returns how many stay.
]]
local stored = {}
if ARGV[2] ~= '' then
    redis.call('SELECT', ARGV[2])
    for i = 3, #ARGV, 2 do
        stored[i] = redis.call('EXISTS', ARGV[i + 1]) == 1
    end
    redis.call('SELECT', ARGV[1])
end
local tags, stay = {}, 0
for i = 3, #ARGV, 2 do
    if ARGV[2] == '' or stored[i] then
        tags[#tags + 1] = ARGV[i]
    else
        stay = stay + 1
    end
end
if #tags > 0 then
    -- The payload goes first: an index entry without one is harmless, not the reverse.
    redis.call('HDEL', KEYS[1], unpack(tags))
    redis.call('ZREM', KEYS[2], unpack(tags))
end
return stay
