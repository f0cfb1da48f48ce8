--[[
replay: move a dead letter back to the queue.

KEYS 1 dead        list
     2 queue       list
ARGV 1 letter      string as it is in the list
     2 message     string to push

Returns 1, or 0 if the letter is gone.
]]
if not redis.call('LPOS', KEYS[1], ARGV[1]) then
    return 0
end
redis.call('LPUSH', KEYS[2], ARGV[2])
redis.call('LREM', KEYS[1], 1, ARGV[1])
return 1
