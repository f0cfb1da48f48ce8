--[[
backlog: how the queue stands. Reads only.

KEYS 1 queue       list
     2 parked      hash
     3 suspects    list
     4 dead        list   dead letters
     5 workers     zset   worker by its last sign of life (s, this server's)
     6 unhealthy   zset   the same, of workers none of whose relays is healthy
ARGV 1 silence     s      after which a worker counts as gone

Returns {queued, parked, suspects, dead, workers alive, age of the queue's oldest request (ms), workers alive without a
healthy relay}. The age is that of the oldest message that says when it was made, for not everyone's do; -1 if none of the
oldest LOOKED_AT says it.
]]
local LOOKED_AT = 16

local time = redis.call('TIME')
local seconds = time[1] + time[2] / 1000000
local made
for i = 1, LOOKED_AT do
    local message = redis.call('LINDEX', KEYS[1], -i)
    -- By its text: the message may be anything, of any size, and this need not be exact.
    made = message and tonumber(string.match(string.sub(message, 1, 65536), '"enqueued_at"%s*:%s*([%d.]+)'))
    if made or not message then
        break
    end
end
return {
    redis.call('LLEN', KEYS[1]),
    redis.call('HLEN', KEYS[2]),
    redis.call('LLEN', KEYS[3]),
    redis.call('LLEN', KEYS[4]),
    redis.call('ZCOUNT', KEYS[5], seconds - ARGV[1], '+inf'),
    made and math.max(0, math.floor((seconds - made) * 1000)) or -1,
    redis.call('ZCOUNT', KEYS[6], seconds - ARGV[1], '+inf'),
}
