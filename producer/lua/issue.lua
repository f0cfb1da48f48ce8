--[[
issue: may this request send now, and which code? One atomic step.

KEYS 1 request record   hash    what is remembered of the request id
     2 code             string  the code itself; GateServer reads it
     3 attempts         hash    wrong checks of the code
     4 cooldown         string  fingerprint of the code in the last accepted mail
     5 sending          string  id of the request whose mail is on the wire
     6 joined           set     ids of the requests that wait for that mail's outcome
     7 bucket           string  when the address' bucket is full again (ms)
ARGV 1 request id
     2 who              string  hash of address and purpose: the same id must come with the same
     3 token            string  names this holder of the lease
     4 verdict          int     an error that is certain already, or ''
     5 enqueued at      ms      or '': then the age counts from the first time the request was seen
     6 expires at       ms      or ''
     7 candidate        string  the code to set if there is none
     8 lease            ms
     9 give up after    ms
    10 ttl              ms
    11 minimum life     ms
    12 cooldown         ms      0: off, and no joins
    13 interval         ms      one send comes back to the bucket; 0: off
    14 burst            int     the bucket's size
    15 remember         ms      life of the record

Returns {'send', code, life ms, ms until the deadline, tries so far}
      | {'answered', error, why}   final; also stored in the record; why: 'cooldown', 'bucket' (it is empty) or nothing
      | {'wait', ms}          the same id is being sent by another holder
      | {'join', ms}          another request's mail to the same code key is on the wire
      | {'conflict'}          the id belongs to another address or purpose; nothing was changed

The record: who, first (ms), token, until (lease, ms), charged (1: the bucket was), doubts (sends that may have been
accepted), dot (1: the present send wrote its final dot), mark (fingerprint of the code issued), tries, error (present =
answered). Times are this server's.
]]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local id, who, token = ARGV[1], ARGV[2], ARGV[3]
local remember = ARGV[15]

local record = redis.call('HMGET', KEYS[1], 'who', 'first', 'token', 'until', 'charged', 'doubts', 'dot', 'mark', 'tries',
    'error')
if record[1] and record[1] ~= who then
    return { 'conflict' }
end
if record[10] then
    return { 'answered', tonumber(record[10]) }
end

local first = tonumber(record[2]) or now
local doubts = (tonumber(record[6]) or 0) + (tonumber(record[7]) or 0)
local interval = tonumber(ARGV[13])
local function answer(error, why)
    if record[5] == '1' and doubts == 0 then
        -- Charged for a send that no relay accepted; the worker that would have said so is gone.
        local full = tonumber(redis.call('GET', KEYS[7])) or 0
        if full - interval > now then
            redis.call('SET', KEYS[7], string.format('%.0f', full - interval), 'PX', string.format('%.0f', full - interval - now))
        else
            redis.call('DEL', KEYS[7])
        end
        redis.call('HSET', KEYS[1], 'charged', 0)
    end
    redis.call('HSET', KEYS[1], 'who', who, 'first', first, 'error', error)
    redis.call('HDEL', KEYS[1], 'token', 'until')
    redis.call('PEXPIRE', KEYS[1], remember)
    return { 'answered', error, why }
end

if ARGV[4] ~= '' then
    return answer(tonumber(ARGV[4]))
end
if record[3] and record[3] ~= token and tonumber(record[4]) > now then
    return { 'wait', tonumber(record[4]) - now }
end

local born = math.min(tonumber(ARGV[5]) or first, now)
local deadline = math.min(born + ARGV[9], tonumber(ARGV[6]) or math.huge)
if now >= deadline then
    return answer(6)
end

local code = redis.call('GET', KEYS[2])
local life = redis.call('PTTL', KEYS[2])
local live = code and code ~= '' and life > 0
local cooldown = tonumber(ARGV[12])
if cooldown > 0 then
    if live and redis.call('GET', KEYS[4]) == redis.sha1hex(code) then
        return answer(0, 'cooldown')
    end
    local holder = redis.call('GET', KEYS[5])
    if holder and holder ~= id then
        -- A holder of this request that stood still, if there was one, may not send any more.
        redis.call('HDEL', KEYS[1], 'token', 'until')
        redis.call('HSET', KEYS[1], 'who', who, 'first', first)
        redis.call('PEXPIRE', KEYS[1], remember)
        redis.call('SADD', KEYS[6], id)
        redis.call('PEXPIRE', KEYS[6], remember)
        return { 'join', math.min(redis.call('PTTL', KEYS[5]), deadline - now) }
    end
end

-- A mail of this request may have been accepted: once more with the very same code, or not at all.
if doubts > 0 and (doubts > 1 or not live or redis.sha1hex(code) ~= record[8]) then
    return answer(6)
end

if interval > 0 and record[5] ~= '1' then
    local full = math.max(tonumber(redis.call('GET', KEYS[7])) or 0, now)
    if full - now > (ARGV[14] - 1) * interval then
        return answer(4, 'bucket')
    end
    redis.call('SET', KEYS[7], string.format('%.0f', full + interval), 'PX', string.format('%.0f', full + interval - now))
end

if doubts == 0 and (not live or life < tonumber(ARGV[11])) then
    code = ARGV[7]
    life = tonumber(ARGV[10])
    redis.call('SET', KEYS[2], code, 'PX', life)
    redis.call('DEL', KEYS[3])
end

redis.call('HSET', KEYS[1], 'who', who, 'first', first, 'token', token, 'until', string.format('%.0f', now + ARGV[8]),
    'charged', interval > 0 and 1 or 0, 'doubts', doubts, 'dot', 0, 'mark', redis.sha1hex(code))
redis.call('PEXPIRE', KEYS[1], remember)
if cooldown > 0 then
    redis.call('SET', KEYS[5], id, 'PX', ARGV[8])
end
return { 'send', code, life, deadline - now, tonumber(record[9]) or 0 }
