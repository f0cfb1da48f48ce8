--[[
reserve: take up to so many messages, in one atomic step: each leaves its list and stands in `unacked` with its index, or,
if it is unfit, in the dead letters. Parked requests that are due come first, oldest first; then the list's end.

KEYS 1 queue       list   what producers LPUSH
     2 ready       zset   parked requests that are due: id by birth (ms)
     3 parked      hash   id -> birth (ms), a space, message
     4 suspects    list   messages whose worker died twice; each is taken by a worker that holds nothing else
     5 unacked     hash   tag -> [message, exchange, routing key], as kombu writes it
     6 index       zset   tag by time (s, this server's)
     7 dead        list   dead letters, JSON
ARGV 1 how many
     2 tag prefix  string unique to this call
     3 task        string the only task there is
     4 queue name  string
     5 held        int    messages that this worker holds already

Returns {suspects left, 1 if the one taken is a suspect, tag, message, tag, message ...}.
RPOP comes first: a full server (maxmemory) refuses a script's first write only if it may need memory, so this one never
stops half way.
]]
local time = redis.call('TIME')
local seconds = time[1] + time[2] / 1000000
local count, prefix, held = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[5])
local suspects = redis.call('LLEN', KEYS[4])

local function is_text(value)
    return type(value) == 'string' and value ~= ''
end

local function fault(message)
    local fine, envelope = pcall(cjson.decode, message)
    if not fine then return 'not JSON' end
    if type(envelope) ~= 'table' then return 'not a JSON object' end
    local headers, properties = envelope.headers, envelope.properties
    if type(headers) ~= 'table' then return 'no headers' end
    if not is_text(headers.task) then return 'no task in the headers' end
    if headers.task ~= ARGV[3] then return 'unknown task' end
    if not is_text(headers.id) or #headers.id > 255 then return 'no id in the headers' end
    if envelope['content-type'] ~= 'application/json' then return 'content-type is not application/json' end
    if envelope['content-encoding'] ~= 'utf-8' then return 'content-encoding is not utf-8' end
    if type(properties) ~= 'table' then return 'no properties' end
    if not is_text(properties.delivery_tag) then return 'no delivery_tag in the properties' end
    if properties.body_encoding ~= 'base64' then return 'body_encoding is not base64' end
    local info = properties.delivery_info
    if type(info) ~= 'table' then return 'no delivery_info in the properties' end
    if type(info.exchange) ~= 'string' or type(info.routing_key) ~= 'string' then
        return 'no exchange or routing_key in the delivery_info'
    end
    if not is_text(envelope.body) then return 'no body' end
    return nil
end

local taken = { suspects, 0 } -- what follows has the tags 2, 4, 6 ...: RequestQueue.tags_of knows that
local function take(message)
    local reason = fault(message)
    if reason then
        redis.call('LPUSH', KEYS[7], cjson.encode({ reason = reason, at = seconds, message = message }))
        return
    end
    local tag = prefix .. #taken
    redis.call('HSET', KEYS[5], tag, '[' .. message .. ',"","' .. ARGV[4] .. '"]')
    redis.call('ZADD', KEYS[6], seconds, tag)
    taken[#taken + 1] = tag
    taken[#taken + 1] = message
end

if suspects > 0 then
    if held == 0 then
        taken[2] = 1
        take(redis.call('RPOP', KEYS[4]))
    end
    return taken
end

local due = redis.call('ZPOPMIN', KEYS[2], count)
for i = 1, #due, 2 do
    local entry = redis.call('HGET', KEYS[3], due[i])
    redis.call('HDEL', KEYS[3], due[i])
    if entry then
        take(string.match(entry, '^%d+ (.*)$'))
    end
end
for _ = #due / 2 + 1, count do
    local message = redis.call('RPOP', KEYS[1])
    if not message then break end
    take(message)
end
return taken
