--[[
release: put reserved messages back on the queue, to be served next, in the order in which they were taken.

KEYS 1 unacked     hash
     2 index       zset
     3 queue       list
ARGV               tags, in the order in which they were taken

Returns how many were put back.
]]
local back = 0
for i = #ARGV, 1, -1 do
    local entry = redis.call('HGET', KEYS[1], ARGV[i])
    if entry then
        redis.call('RPUSH', KEYS[3], (message_of(entry)))
        local removed = redis.pcall('HDEL', KEYS[1], ARGV[i])
        if type(removed) == 'table' and removed.err then
            redis.pcall('RPOP', KEYS[3])
            return redis.error_reply(removed.err)
        end
        redis.call('ZREM', KEYS[2], ARGV[i])
        back = back + 1
    end
end
return back
