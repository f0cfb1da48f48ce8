--[[
answer: store and publish replies, one after the other, then remove the messages whose replies were taken. The first reply to
a request stands. Runs after each.lua, in the database of the replies.

KEYS 1   unacked   hash   in the broker's database, as is the index
     2   index     zset
     i+2 reply     string celery-task-meta-<id>, also the channel
ARGV 1   broker    int    number of the broker's database, on this server; '': the messages stay
     3i-1 life     s      '': this reply is not final, so it is only published; where one is stored, that one is
     3i  payload   string
     3i+1 tag      string of the message; '': it stays

Returns for each reply 1 if it is the first that was stored, 0 if not, or its error: then its message stays. Last, 1 if the other
messages are removed, else 0 or an error.
]]
local tags = {}

local answer = each(#KEYS - 2, function(i)
    local key, life, payload, tag = KEYS[i + 2], ARGV[3 * i - 1], ARGV[3 * i], ARGV[3 * i + 1]
    local stored = 0
    if life ~= '' and redis.call('SET', key, payload, 'NX', 'EX', life) then
        stored = 1
    else
        local first = redis.call('MGET', key)[1]
        if first then
            payload = first
        elseif life ~= '' then
            -- The key holds another type, which no reply has.
            redis.call('SET', key, payload, 'EX', life)
        end
    end
    redis.call('PUBLISH', key, payload)
    if tag ~= '' then
        tags[#tags + 1] = tag
    end
    return stored
end)
if answer.err then
    return answer
end
local removed = { 0 }
if ARGV[1] ~= '' then
    removed = each(1, function()
        if #tags > 0 then
            redis.call('SELECT', ARGV[1]) -- for the rest of this script only
            -- The message first: an index entry without a message is harmless, a message without an index entry is lost.
            redis.call('HDEL', KEYS[1], unpack(tags))
            redis.call('ZREM', KEYS[2], unpack(tags))
        end
        return 1
    end)
end
answer[#answer + 1] = removed[1] or removed
return answer
