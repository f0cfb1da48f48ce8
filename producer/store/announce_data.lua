--[[
announce_data: the final dots of mails are about to be written; until the outcome of each is settled, acceptance is not known. Once
more for the next relay, after one that refused: still one send. Begins with each.lua.

KEYS i request record   hash
ARGV i token

Returns a list with an entry for each: 1 if this holder has the lease, else 0, or an error of this one alone.
]]
return each(#KEYS, function(i)
    if redis.call('HGET', KEYS[i], 'token') ~= ARGV[i] then
        return 0
    end
    redis.call('HSET', KEYS[i], 'dot', '1')
    return 1
end)
