--[[
reply: store and publish replies, one after the other. The first reply to a request stands. Runs after each.lua.

KEYS i reply       string celery-task-meta-<id>, also the channel
ARGV 1 life        s      '': these replies are not final, so they are only published; where one is stored, that one is
     i+1 payload   string

Returns for each reply 1 if it is the first that was stored, 0 if not, or its error.
]]
local life = ARGV[1]

return each(#KEYS, function(i)
    local key, payload = KEYS[i], ARGV[i + 1]
    if life ~= '' and redis.call('SET', key, payload, 'NX', 'EX', life) then
        redis.call('PUBLISH', key, payload)
        return 1
    end
    local first = redis.call('MGET', key)[1]
    if not first then
        if life ~= '' then
            -- The key holds another type, which no reply has.
            redis.call('SET', key, payload, 'EX', life)
        end
        first = payload
    end
    redis.call('PUBLISH', key, first)
    return 0
end)
