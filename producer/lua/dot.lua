--[[
dot: the final dot of a mail is about to be written; until its outcome is settled, acceptance is not known.
Once more for the next relay, after one that refused: still one send.

KEYS 1 request record   hash
ARGV 1 token

Returns 1 if this holder has the lease, else 0.
]]
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then
    return 0
end
redis.call('HSET', KEYS[1], 'dot', 1)
return 1
