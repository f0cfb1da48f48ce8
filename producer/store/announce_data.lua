--[[
announce_data: mails are about to be sent; until a send is settled its acceptance is unknown. Called again when another
connection or relay is tried: that is still one send. Begins with each.lua.

KEYS i request record   hash    see issue.lua
ARGV i token            string

Returns a list with an entry for each: 1 if this holder has the lease, else 0, or an error of this one alone.
]]
-- Changes nothing, and needs no memory: a full server refuses only a script's first write, and what was issued may leave.
redis.pcall('HDEL', KEYS[1], '')
return each(#KEYS, function(i)
    if redis.call('HGET', KEYS[i], 'token') ~= ARGV[i] then
        return 0
    end
    redis.call('HSET', KEYS[i], 'dot', '1')
    return 1
end)
