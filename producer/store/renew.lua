--[[
renew: the holders of these leases are alive. Begins with each.lua.

KEYS 2i-1 request record   hash    see issue.lua
     2i   sending          string
ARGV 1    lease            ms
     2i   request id       string
     2i+1 token            string

Returns a list with an entry for each: 1 if this holder still has the lease, else 0, or an error of this one alone.
]]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
return each(#KEYS / 2, function(i)
    local record, sending, id, token = KEYS[2 * i - 1], KEYS[2 * i], ARGV[2 * i], ARGV[2 * i + 1]
    if redis.call('HGET', record, 'token') ~= token then
        return 0
    end
    -- Changes nothing, and needs no memory: a full server refuses only a script's first write.
    redis.call('HDEL', record, '')
    redis.call('HSET', record, 'until', string.format('%.0f', now + ARGV[1]))
    if redis.call('MGET', sending)[1] == id then
        redis.call('PEXPIRE', sending, ARGV[1])
    end
    return 1
end)
