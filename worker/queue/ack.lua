--[[
ack: these messages are done. On one server, a message whose reply was refused just before, in the same trip, stays.

KEYS 1 unacked     hash
     2 index       zset
ARGV 1 broker      int    number of its database
     2 results     int    number of theirs; '' if the replies are known to be stored
     3 count       int    of tags
     4 ...                tags, then the key of each one's reply

Returns how many stay.
]]
local count = tonumber(ARGV[3])
local tags = { unpack(ARGV, 4, count + 3) }
if ARGV[2] ~= '' then
    redis.call('SELECT', ARGV[2])
    -- As a rule they all are stored, which one question tells.
    if redis.call('EXISTS', unpack(ARGV, count + 4)) < count then
        tags = {}
        for i = 4, count + 3 do
            if redis.call('EXISTS', ARGV[i + count]) == 1 then
                tags[#tags + 1] = ARGV[i]
            end
        end
    end
    redis.call('SELECT', ARGV[1])
end
if #tags > 0 then
    -- The payload goes first: an index entry without one is harmless, not the reverse.
    redis.call('HDEL', KEYS[1], unpack(tags))
    redis.call('ZREM', KEYS[2], unpack(tags))
end
return count - #tags
