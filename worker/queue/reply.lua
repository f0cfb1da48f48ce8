--[[
reply: store and publish replies, one after the other; begins with each.lua. The first one stands: a request has exactly one.

KEYS i reply       string  celery-task-meta-<id>, also the channel
ARGV 1 life        s
     i+1 payload   string

Returns a list with an entry for each: 1 if it is the first, else 0, or an error of this one alone.
]]
local life = ARGV[1]

return each(#KEYS, function(i)
    local key, payload = KEYS[i], ARGV[i + 1]
    if redis.call('SET', key, payload, 'NX', 'EX', life) then
        redis.call('PUBLISH', key, payload)
        return 1
    end
    local first = redis.call('MGET', key)[1]
    if not first then
        -- Something else has our key, which no reply ever had.
        redis.call('SET', key, payload, 'EX', life)
        first = payload
    end
    redis.call('PUBLISH', key, first)
    return 0
end)
