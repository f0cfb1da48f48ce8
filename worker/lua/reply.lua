--[[
reply: store and publish one reply. The first one stands: a request has exactly one.

KEYS 1 reply       string  celery-task-meta-<id>, also the channel
ARGV 1 payload     string
     2 life        s

Returns 1 if it is the first.
]]
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', ARGV[2]) then
    redis.call('PUBLISH', KEYS[1], ARGV[1])
    return 1
end
local first = redis.pcall('GET', KEYS[1])
if type(first) ~= 'string' then
    -- Something else has our key, which no reply ever had.
    redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
    first = ARGV[1]
end
redis.call('PUBLISH', KEYS[1], first)
return 0
