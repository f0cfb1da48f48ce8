--[[
schedule: hold reserved requests back until their ETA.

KEYS 1 unacked     hash
     2 index       zset
     3 due         zset   as in delay.lua; these requests stand there by their tag and not by their id, so that a message
                          with another request's id cannot replace that request
     4 delayed     hash   entry by tag, see delayed.lua
ARGV 2i-1 tag
     2i   due             ms, Unix time

Returns for each 1: it is delayed, or this worker does not hold it any more; or 0: it is due now, and stays reserved. A
command that is refused does not undo the script: the message is written to its new place first.
]]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local answer = {}
for i = 1, #ARGV, 2 do
    local tag, due = ARGV[i], tonumber(ARGV[i + 1])
    local entry = redis.call('HGET', KEYS[1], tag)
    if entry and due > now then
        local message = message_of(entry)
        redis.call('ZADD', KEYS[3], string.format('%.0f', due), tag)
        redis.call('HSET', KEYS[4], tag, delayed_entry(due, message))
        redis.call('HDEL', KEYS[1], tag)
        redis.call('ZREM', KEYS[2], tag)
        entry = false
    end
    answer[#answer + 1] = entry and 0 or 1
end
return answer
