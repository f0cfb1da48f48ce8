--[[
push: puts requests on the queue while it has room. One atomic step, so that no number of callers can exceed the limit.

KEYS 1 queue       list
     2 delayed     hash   requests that wait elsewhere count too
     3 suspects    list   likewise
ARGV 1 limit       int    with more waiting than this, nothing is pushed
     2 ...                messages

Returns how many were pushed, from the first one on.
]]
local waiting = redis.call('LLEN', KEYS[1]) + redis.call('HLEN', KEYS[2]) + redis.call('LLEN', KEYS[3])
local room = math.min(#ARGV - 1, ARGV[1] + 1 - waiting)
if room <= 0 then return 0 end
redis.call('LPUSH', KEYS[1], unpack(ARGV, 2, room + 1))
return room
