--[[
renew: the holders of these leases are alive.

KEYS 2i-1 request record   hash    see issue.lua
     2i   sending          string
ARGV 1    lease            ms
     2i   request id       string
     2i+1 token            string

Returns for each 1 if this holder still has the lease, else 0.
]]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local kept = {}
for i = 1, #KEYS / 2 do
    local record, sending, id, token = KEYS[2 * i - 1], KEYS[2 * i], ARGV[2 * i], ARGV[2 * i + 1]
    kept[i] = 0
    if redis.call('HGET', record, 'token') == token then
        redis.call('HSET', record, 'until', string.format('%.0f', now + ARGV[1]))
        if redis.call('GET', sending) == id then
            redis.call('PEXPIRE', sending, ARGV[1])
        end
        kept[i] = 1
    end
end
return kept
