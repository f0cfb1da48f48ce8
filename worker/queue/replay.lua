--[[
replay: a dead letter goes back to the queue, in one step.

KEYS 1 dead        list
     2 queue       list
ARGV 1 letter      string as it stands in the list
     2 message     string to push

Returns 1, or 0 if the letter is not there any more.
]]
if not redis.call('LPOS', KEYS[1], ARGV[1]) then
    return 0
end
redis.call('LPUSH', KEYS[2], ARGV[2])
redis.call('LREM', KEYS[1], 1, ARGV[1])
return 1
