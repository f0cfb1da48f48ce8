--[[
reply: store and publish replies, one after the other. The first reply to a request stands. Runs after each.lua.

KEYS i reply       string celery-task-meta-<id>, also the channel
ARGV 1 life        s
     i+1 payload   string

Returns for each reply 1 if it is the first, 0 if not, or its error.
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
        -- The key holds another type, which no reply has.
        redis.call('SET', key, payload, 'EX', life)
        first = payload
    end
    redis.call('PUBLISH', key, first)
    return 0
end)
