--[[
ack: remove messages that are done. If the databases are on one server, a message stays whose reply was refused just before
in the same round trip.

KEYS 1 unacked     hash
     2 index       zset
ARGV 1 broker      int    number of the broker database
     2 results     int    number of the results database; '': the replies are known to be stored
     3 count       int    of tags
     4 ...                tags, then as many keys of replies

Returns how many stay.
]]
local count = tonumber(ARGV[3])
local tags = { unpack(ARGV, 4, count + 3) }
if ARGV[2] ~= '' then
    redis.call('SELECT', ARGV[2])
    -- Usually all are stored, and one command tells.
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
    -- The message first: an index entry without a message is harmless, a message without an index entry is lost.
    redis.call('HDEL', KEYS[1], unpack(tags))
    redis.call('ZREM', KEYS[2], unpack(tags))
end
return count - #tags
