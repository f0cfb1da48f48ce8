--[[
ack: these messages are done.

KEYS 1 unacked     hash
     2 index       zset
ARGV               tags

Returns how many were still ours. ZADD comes first: a full server (maxmemory), which has refused to store the replies that
went before, then refuses this too, and the messages stay.
]]
local acked = 0
for i = 1, #ARGV do
    redis.call('ZADD', KEYS[2], 'XX', 0, ARGV[i])
    acked = acked + redis.call('HDEL', KEYS[1], ARGV[i])
    redis.call('ZREM', KEYS[2], ARGV[i])
end
return acked
