--[[
delay: hold a reserved request back until it is due or woken.

KEYS 1 unacked     hash
     2 index       zset
     3 due         zset   id by due time (ms)
     4 delayed     hash   entry by id, see delayed.lua
     5 queue       list
     6 woken       string exists: what the request waits for has happened already, so it goes back to the queue
ARGV 1 tag
     2 request id
     3 delay       ms
     4 birth       ms     Unix time; '': now

Returns 1, or 0 if this worker does not hold the message any more. A command that is refused does not undo the script: the
message is written to its new place first and removed from its old one last, so that it is not lost.
]]
local entry = redis.call('HGET', KEYS[1], ARGV[1])
if not entry then
    return 0
end
local message = message_of(entry)
if redis.call('EXISTS', KEYS[6]) == 1 then
    redis.call('RPUSH', KEYS[5], message)
    redis.call('DEL', KEYS[6])
else
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    local birth = math.max(math.min(tonumber(ARGV[4]) or now, now), 0)
    -- Both can be repeated.
    redis.call('ZADD', KEYS[3], string.format('%.0f', now + ARGV[3]), ARGV[2])
    redis.call('HSET', KEYS[4], ARGV[2], delayed_entry(birth, message))
end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
