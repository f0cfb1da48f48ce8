--[[
settle: what became of a send. Compare-and-set by the lease's token: a holder that lost its lease changes nothing.

KEYS 1 request record   hash
     2 code             string
     3 cooldown         string
     4 sending          string
     5 joined           set
     6 bucket           string
ARGV 1 request id
     2 token
     3 outcome          'answered' | 'failed' (no relay accepted it, try again) | 'unknown' (a relay may have; try again)
     4 error            int     of an 'answered'
     5 cooldown         ms      0: off
     6 interval         ms      of the bucket; 0: off
     7 remember         ms
     8 record prefix    string  to reach the records of joined requests

Returns {1 if this holder had the lease, id to wake ...}. With error 0 and the code in the mail still live, and with an
error that is final for the mailbox, every joined request has the same answer in its record; else one of them may send.
]]
local record = redis.call('HMGET', KEYS[1], 'token', 'error', 'who', 'charged', 'mark', 'doubts', 'dot')
if record[1] ~= ARGV[2] or record[2] then
    return { 0 }
end
local outcome, error = ARGV[3], ARGV[4]
local accepted = outcome == 'answered' and error == '0'
local cooldown, interval = tonumber(ARGV[5]), tonumber(ARGV[6])

-- Only what certainly no relay accepted is refunded: not this send, nor an earlier one of the same request.
local doubts = tonumber(record[6]) or 0
local doubtful = outcome == 'unknown' or (error == '6' and record[7] == '1')
if record[4] == '1' and not accepted and not doubtful and doubts == 0 then
    local life = redis.call('PTTL', KEYS[6]) - interval
    if life > 0 then
        redis.call('SET', KEYS[6], string.format('%.0f', redis.call('GET', KEYS[6]) - interval), 'PX', life)
    else
        redis.call('DEL', KEYS[6])
    end
    redis.call('HSET', KEYS[1], 'charged', 0)
end

redis.call('HDEL', KEYS[1], 'token', 'until', 'dot')
if outcome == 'answered' then
    redis.call('HSET', KEYS[1], 'error', error)
else
    redis.call('HINCRBY', KEYS[1], 'tries', 1)
    if outcome == 'unknown' then
        redis.call('HSET', KEYS[1], 'doubts', doubts + 1)
    end
end
redis.call('PEXPIRE', KEYS[1], ARGV[7])

local live = false
if accepted and cooldown > 0 then
    local code = redis.call('GET', KEYS[2])
    local life = redis.call('PTTL', KEYS[2])
    live = code and life > 0 and redis.sha1hex(code) == record[5]
    if live then
        redis.call('SET', KEYS[3], record[5], 'PX', math.min(cooldown, life))
    end
end

if redis.call('GET', KEYS[4]) ~= ARGV[1] then
    return { 1 }
end
redis.call('DEL', KEYS[4])
local wake = { 1 }
if live or (outcome == 'answered' and (error == '3' or error == '5')) then
    for _, id in ipairs(redis.call('SMEMBERS', KEYS[5])) do
        redis.call('HSET', ARGV[8] .. id, 'who', record[3])
        redis.call('HSETNX', ARGV[8] .. id, 'error', error)
        redis.call('HDEL', ARGV[8] .. id, 'token', 'until')
        redis.call('PEXPIRE', ARGV[8] .. id, ARGV[7])
        wake[#wake + 1] = id
    end
    redis.call('DEL', KEYS[5])
else
    -- One that was answered meanwhile, at its deadline, has nothing left to send.
    local id = redis.call('SPOP', KEYS[5])
    while id and redis.call('HEXISTS', ARGV[8] .. id, 'error') == 1 do
        id = redis.call('SPOP', KEYS[5])
    end
    wake[2] = id or nil
end
return wake
