--[[
wake: put delayed requests back on the queue, to be served next. A request that is yet to be delayed finds a note instead.
One whose entry has a version that is not known becomes due instead.

KEYS 1 due         zset
     2 ready       zset
     3 delayed     hash
     4 queue       list
ARGV 1 woken       string key prefix of the notes
     2 life        ms     of a note
     3 ...                request ids

Returns how many were put back.
]]
local found = 0
for i = 3, #ARGV do
    local entry = redis.call('HGET', KEYS[3], ARGV[i])
    if entry then
        local _, message = read_delayed(entry)
        if message then
            redis.call('RPUSH', KEYS[4], message)
            redis.call('HDEL', KEYS[3], ARGV[i])
            redis.call('ZREM', KEYS[1], ARGV[i])
            redis.call('ZREM', KEYS[2], ARGV[i])
            found = found + 1
        else
            redis.call('ZADD', KEYS[1], 0, ARGV[i])
        end
    else
        redis.call('SET', ARGV[1] .. ARGV[i], 1, 'PX', ARGV[2])
    end
end
return found
