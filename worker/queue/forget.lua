--[[
forget: remove a delayed request, unless it has changed.

KEYS 1 delayed     hash
     2 due         zset
     3 ready       zset
ARGV 1 field       string request id, or tag
     2 entry       string as it was read

Returns 1, or 0 if it has been taken or delayed anew.
]]
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
    return 0
end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
return 1
