--[[
ack: remove messages that are done.

KEYS 1 unacked     hash
     2 index       zset
ARGV               tags

Returns 0.
]]
-- The message first: an index entry without a message is harmless, a message without an index entry is lost.
redis.call('HDEL', KEYS[1], unpack(ARGV))
redis.call('ZREM', KEYS[2], unpack(ARGV))
return 0
