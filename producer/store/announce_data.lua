--[[
announce_data: the final dots of mails are about to be written; until a send is settled its acceptance is unknown. Called
again when another relay is tried after one that refused: that is still one send. Begins with each.lua.

KEYS i request record   hash    see issue.lua
ARGV i token            string

Returns a list with an entry for each: 1 if this holder has the lease, else 0, or an error of this one alone.
]]
return each(#KEYS, function(i)
    if redis.call('HGET', KEYS[i], 'token') ~= ARGV[i] then
        return 0
    end
    redis.call('HSET', KEYS[i], 'dot', '1')
    return 1
end)
