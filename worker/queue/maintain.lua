--[[
maintain: what a living worker does every second. It renews its reservations; messages that no worker renewed for the whole
visibility timeout go back to the queue; delayed requests that are due become ready; dead letters that are too old or too
many go; and it leaves a sign of life. An entry that another release wrote and this one cannot read is left for others; it is
looked at again in the next round, after all others.

KEYS 1 index       zset
     2 unacked     hash
     3 queue       list
     4 suspects    list   suspected poison messages
     5 due         zset   delayed requests: id by due time (ms)
     6 ready       zset   id by birth (ms)
     7 delayed     hash   entry by id, see delayed.lua
     8 workers     zset   worker by its last sign of life (s)
     9 unhealthy   zset   the same, of workers without a healthy relay
     10 dead       list   dead letters, the newest first
ARGV 1 visibility  s      the timeout; 0: restore nothing
     2 most        int    messages to move in one call
     3 tag prefix  string unique to this call
     4 deaths      string key prefix of the counters of dead workers, by request id; by the message's hash if it has none
     5 life        s      of such a counter
     6 suspect     int    deaths after which a message is tried alone
     7 poison      int    deaths after which a message is not tried again
     8 worker      string unique to the process
     9 healthy     1 or 0 whether the worker has a healthy relay
     10 largest    bytes   a larger message is not decoded
     11 dead age   s       of the oldest dead letter to keep
     12 dead kept  int     dead letters to keep, at most
     13 expected   s       this server's time as far as the worker knows; ''. While the time is far ahead of that, nothing is
                           restored: the clock was set forward, and all look dead until they have renewed what they hold
     14 ...                tags that the worker holds

Returns {ready, suspects, restored, dead letters too old, dead letters too many, entries left for others, refusal, tag,
message ...}. `refusal`: the first word of the error with which the server refuses what takes memory, else ''. This call has
reserved the messages because each has killed so many workers as `poison` says; they must be answered and dead-lettered. Or
the error READONLY: a replica must say what it is, so that the connection is dropped, as a worker that holds nothing and finds
an empty queue asks for no other write.
]]
local LOOKED_AT = 100 -- dead letters in one call

local time = redis.call('TIME')
local seconds = time[1] + time[2] / 1000000
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local score = string.format('%.0f', math.ceil(seconds)) -- as in reserve.lua

-- This changes nothing, and tells whether the server refuses what takes memory.
local result = { 0, 0, 0, 0, 0, 0, '' }
local tried = redis.pcall('ZADD', KEYS[8], 'XX', seconds, '')
if type(tried) == 'table' and tried.err then
    result[7] = string.match(tried.err, '%u%u%u+') or 'ERR'
    if result[7] == 'READONLY' then
        return redis.error_reply((string.gsub(tried.err, '^%-', '')))
    end
end
-- This takes none: a full server refuses only a script's first write, and what workers hold must be renewed even there.
redis.pcall('HDEL', KEYS[2], '')
for i = 14, #ARGV do
    redis.call('ZADD', KEYS[1], 'XX', score, ARGV[i])
end

local visibility, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local clock_was_set = seconds - (tonumber(ARGV[13]) or seconds) > visibility / 4
if visibility > 0 and not clock_was_set then
    local stale = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', seconds - visibility, 'LIMIT', 0, most)
    for i = #stale, 1, -1 do
        local entry = redis.call('HGET', KEYS[2], stale[i])
        local message, queue = message_of(entry or '')
        -- All queues of a database share kombu's keys: leave another queue's messages alone.
        if entry and not message then
            redis.call('ZADD', KEYS[1], 'XX', seconds - visibility, stale[i])
            result[6] = result[6] + 1
        elseif queue == KEYS[3] then
            local deaths = 1
            -- A message that is too large is not decoded: it goes back to the queue, where it is dead-lettered.
            if #message <= tonumber(ARGV[10]) then
                local fine, envelope = pcall(cjson.decode, message)
                local id = fine and type(envelope) == 'table' and type(envelope.headers) == 'table' and envelope.headers.id
                local key = ARGV[4] .. (type(id) == 'string' and id or redis.sha1hex(message))
                local counted = redis.pcall('INCR', key)
                redis.pcall('EXPIRE', key, ARGV[5])
                deaths = type(counted) == 'number' and counted or 1
            end
            -- Written first and removed last, so that a refused command loses no message.
            if deaths >= tonumber(ARGV[7]) then
                local tag = ARGV[3] .. #result
                redis.call('HSET', KEYS[2], tag, entry)
                redis.call('ZADD', KEYS[1], score, tag)
                result[#result + 1] = tag
                result[#result + 1] = message
            elseif deaths >= tonumber(ARGV[6]) then
                redis.call('RPUSH', KEYS[4], message)
            else
                redis.call('RPUSH', KEYS[3], message)
            end
            result[3] = result[3] + 1
        end
        if not entry or queue == KEYS[3] then
            redis.call('ZREM', KEYS[1], stale[i])
            redis.call('HDEL', KEYS[2], stale[i])
        end
    end
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[5], '-inf', now, 'LIMIT', 0, most)) do
    local entry = redis.call('HGET', KEYS[7], id)
    local since = entry and read_delayed(entry)
    if entry and not since then
        redis.call('ZADD', KEYS[5], now, id)
        result[6] = result[6] + 1
    else
        if since then
            redis.call('ZADD', KEYS[6], since, id)
        end
        redis.call('ZREM', KEYS[5], id)
    end
end
-- A dead letter without a time, which no worker wrote, is removed with the next newer one that has a time and is too old. Errors
-- are ignored: the key may hold another type.
pcall(function()
    local length, kept = redis.call('LLEN', KEYS[10]), tonumber(ARGV[12])
    if length > kept then
        redis.call('LTRIM', KEYS[10], 0, kept - 1)
        result[5], length = length - kept, kept
    end
    local old = 0
    for i = 1, math.min(length, LOOKED_AT) do
        local at = tonumber(string.match(redis.call('LINDEX', KEYS[10], -i), '"at"%s*:%s*([%d.eE+-]+)'))
        if at and at >= seconds - ARGV[11] then
            break
        end
        old = at and i or old
    end
    if old > 0 then
        redis.call('LTRIM', KEYS[10], 0, -old - 1)
        result[4] = old
    end
end)
-- Last: a worker that cannot do the rest gives no sign of life.
redis.pcall('ZADD', KEYS[8], seconds, ARGV[8])
if ARGV[9] == '1' then
    redis.pcall('ZREM', KEYS[9], ARGV[8])
else
    redis.pcall('ZADD', KEYS[9], seconds, ARGV[8])
end
for i = 8, 9 do
    redis.pcall('ZREMRANGEBYSCORE', KEYS[i], '-inf', seconds - 60)
    redis.pcall('EXPIRE', KEYS[i], 60)
end
result[1] = redis.call('ZCARD', KEYS[6])
result[2] = redis.call('LLEN', KEYS[4])
return result
