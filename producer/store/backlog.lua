--[[
backlog: how many requests wait, and who serves them. Reads only.

KEYS 1 queue        list
     2 delayed      hash
     3 suspects     list   poison messages
     4 dead letters list
     5 workers      zset   worker by its last sign of life (s, this server's time)
     6 unhealthy    zset   likewise, workers that have no healthy relay
ARGV 1 silence      s      after which a worker counts as gone
     2 largest      bytes  a larger message is not read

Returns {queued, delayed, suspects, dead letters, workers alive, age of the queue's oldest request (ms), workers alive
without a healthy relay}. The age is that of the oldest message that carries `enqueued_at`; -1 if none of the LOOKED_AT
oldest does.
]]
local LOOKED_AT = 16

local time = redis.call('TIME')
local seconds = time[1] + time[2] / 1000000
local enqueued_at
for i = 1, LOOKED_AT do
    local message = redis.call('LINDEX', KEYS[1], -i)
    -- A text search: the message may be anything, and this need not be exact. One that is too long to be served, which
    -- a worker will dead-letter, ends it: reading 16 of them would hold up the server.
    local long = message and #message > tonumber(ARGV[2])
    enqueued_at = message and not long and tonumber(string.match(message, '"enqueued_at"%s*:%s*([%d.]+)'))
    if enqueued_at or not message or long then
        break
    end
end
return {
    redis.call('LLEN', KEYS[1]),
    redis.call('HLEN', KEYS[2]),
    redis.call('LLEN', KEYS[3]),
    redis.call('LLEN', KEYS[4]),
    redis.call('ZCOUNT', KEYS[5], seconds - ARGV[1], '+inf'),
    enqueued_at and math.max(0, math.floor((seconds - enqueued_at) * 1000)) or -1,
    redis.call('ZCOUNT', KEYS[6], seconds - ARGV[1], '+inf'),
}
