--[[
reserve: take up to so many messages, in one atomic step. Each moves to `unacked` and its index or, if its envelope is
malformed, to the dead letters. Delayed requests that are due come first, the oldest of them first; then the right ends of
the lists. While more messages wait than are taken, every fourth one taken is the queue's newest: its caller still waits for
the reply, while callers behind a long backlog have been answered 6 by the time the worker comes to them.

KEYS 1 queue       list   producers LPUSH to it
     2 ready       zset   delayed requests that are due: id by birth (ms)
     3 delayed     hash   id -> birth (ms), a space, message
     4 suspects    list   suspected poison messages (their worker died twice); only a worker that holds nothing takes one
     5 unacked     hash   tag -> [message, exchange, routing key], as kombu writes it
     6 index       zset   tag by time (s, this server's)
     7 dead        list   dead letters, JSON
     8 ...         list   messages of Celery clients with a lower priority
ARGV 1 count       int    messages to take, at most
     2 tag prefix  string unique to this call
     3 task        string the only task that is known
     4 queue name  string
     5 held        int    messages that this worker holds already
     6 code        string of dead letters that name another task
     7 code        string of dead letters whose envelope is malformed

Returns {suspects left, 1 if the one taken is a suspect, tag, message, tag, message ...}. For a dead letter the tag is ''
and the message is its code, a space and its reason.
A command that is refused (memory, access, a key of another type) does not undo the script. So messages are only read
first, then written to where they go, and only then removed; if they cannot be removed, what was written is taken back.
]]
local time = redis.call('TIME')
local seconds = time[1] + time[2] / 1000000
local score = string.format('%.6f', seconds) -- once: Lua would format a number for each command
local count, prefix, held = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[5])
local UNKNOWN_TASK, ENVELOPE = ARGV[6], ARGV[7]
local suspects = redis.call('LLEN', KEYS[4])

local function is_text(value)
    return type(value) == 'string' and value ~= ''
end

-- Why this message cannot be executed: a code and a text; nil if its envelope is sound.
local function fault(message)
    local fine, envelope = pcall(cjson.decode, message)
    if not fine then return ENVELOPE, 'not JSON' end
    if type(envelope) ~= 'table' then return ENVELOPE, 'not a JSON object' end
    local headers, properties = envelope.headers, envelope.properties
    if type(headers) ~= 'table' then return ENVELOPE, 'no headers' end
    if not is_text(headers.task) then return ENVELOPE, 'no task in the headers' end
    if headers.task ~= ARGV[3] then return UNKNOWN_TASK, 'unknown task' end
    if not is_text(headers.id) or #headers.id > 255 then return ENVELOPE, 'no id in the headers' end
    if envelope['content-type'] ~= 'application/json' then return ENVELOPE, 'content-type is not application/json' end
    if envelope['content-encoding'] ~= 'utf-8' then return ENVELOPE, 'content-encoding is not utf-8' end
    if type(properties) ~= 'table' then return ENVELOPE, 'no properties' end
    if not is_text(properties.delivery_tag) then return ENVELOPE, 'no delivery_tag in the properties' end
    if properties.body_encoding ~= 'base64' then return ENVELOPE, 'body_encoding is not base64' end
    local info = properties.delivery_info
    if type(info) ~= 'table' then return ENVELOPE, 'no delivery_info in the properties' end
    if type(info.exchange) ~= 'string' or type(info.routing_key) ~= 'string' then
        return ENVELOPE, 'no exchange or routing_key in the delivery_info'
    end
    if not is_text(envelope.body) then return ENVELOPE, 'no body' end
    return nil
end

local function refused(answer)
    return type(answer) == 'table' and answer.err
end

local taken = { suspects, 0 }

-- Moves messages of one source. `removals` are the commands that remove them there. Returns the error of a refused command.
local function move(messages, removals)
    local from, payloads, index, dead = #taken, {}, {}, {}
    for _, message in ipairs(messages) do
        local tag = prefix .. #taken
        local code, reason = fault(message)
        if code then
            dead[#dead + 1] = cjson.encode({ code = code, reason = reason, at = seconds, message = message })
            tag, message = '', code .. ' ' .. reason
        else
            payloads[#payloads + 1] = tag
            payloads[#payloads + 1] = '[' .. message .. ',"","' .. ARGV[4] .. '"]'
            index[#index + 1] = score
            index[#index + 1] = tag
        end
        taken[#taken + 1] = tag
        taken[#taken + 1] = message
    end
    local recorded
    local error = #payloads > 0 and (refused(redis.pcall('HSET', KEYS[5], unpack(payloads)))
        or refused(redis.pcall('ZADD', KEYS[6], unpack(index))))
    if not error and #dead > 0 then
        error = refused(redis.pcall('LPUSH', KEYS[7], unpack(dead)))
        recorded = not error
    end
    error = error or refused(redis.pcall(unpack(removals[1])))
    if not error then
        -- They have moved. What a further removal may leave behind points to nothing.
        for i = 2, #removals do
            redis.pcall(unpack(removals[i]))
        end
        return nil
    end
    for i = 1, #payloads, 2 do
        redis.pcall('ZREM', KEYS[6], payloads[i])
        redis.pcall('HDEL', KEYS[5], payloads[i])
    end
    if recorded then
        redis.pcall('LTRIM', KEYS[7], #dead, -1)
    end
    for i = #taken, from + 1, -1 do
        taken[i] = nil
    end
    return error
end

local function answer(error)
    if error and #taken == 2 then
        return redis.error_reply(error)
    end
    return taken
end

if suspects > 0 then
    if held > 0 then
        return taken
    end
    taken[2] = 1
    return answer(move({ redis.call('LINDEX', KEYS[4], -1) }, { { 'RPOP', KEYS[4] } }))
end

-- Moves one end of a list, the oldest (rightmost) first, and keeps the rest. Returns the error of a refused command.
local function take(key, from, to, rest_from, rest_to)
    local found, messages = redis.call('LRANGE', key, from, to), {}
    for j = #found, 1, -1 do
        messages[#messages + 1] = found[j]
    end
    return move(messages, { { 'LTRIM', key, rest_from, rest_to } })
end

local room = count
if redis.call('LLEN', KEYS[1]) > count then
    local newest = math.floor((count + time[2] % 4) / 4)
    if newest > 0 then
        local error = take(KEYS[1], 0, newest - 1, newest, -1)
        if error then
            return answer(error)
        end
        room = room - newest
    end
end
local due = room > 0 and redis.call('ZRANGE', KEYS[2], 0, room - 1) or {}
if #due > 0 then
    local messages = {}
    for _, entry in ipairs(redis.call('HMGET', KEYS[3], unpack(due))) do
        if entry then
            messages[#messages + 1] = string.match(entry, '^%d+ (.*)$')
        end
    end
    local error = move(messages, { { 'HDEL', KEYS[3], unpack(due) }, { 'ZREM', KEYS[2], unpack(due) } })
    if error then
        return answer(error)
    end
    room = room - #messages
end
for i = 1, #KEYS do
    if (i == 1 or i > 7) and room > 0 then
        local found = redis.call('LLEN', KEYS[i])
        if found > 0 then
            found = math.min(found, room)
            local error = take(KEYS[i], -found, -1, 0, -found - 1)
            if error then
                return answer(error)
            end
            room = room - found
        end
    end
end
return taken
