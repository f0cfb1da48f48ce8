--[[
push: put requests on the queue as long as it has room. Looking and pushing are one step, so that no crowd, and no
number of doors, can overshoot.

KEYS 1 queue       list
     2 parked      hash   requests that wait elsewhere; they count too
     3 suspects    list   likewise
ARGV 1 limit       int    with more waiting than this, nothing is pushed
     2 ...                messages

Returns how many were pushed; they are the first ones.
]]
local waiting = redis.call('LLEN', KEYS[1]) + redis.call('HLEN', KEYS[2]) + redis.call('LLEN', KEYS[3])
local room = math.min(#ARGV - 1, ARGV[1] + 1 - waiting)
if room <= 0 then return 0 end
redis.call('LPUSH', KEYS[1], unpack(ARGV, 2, room + 1))
return room
