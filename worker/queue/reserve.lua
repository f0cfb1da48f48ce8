--[[
reserve: take up to so many messages, in one atomic step. Each moves to `unacked` and its index or, if its envelope is
malformed, to the dead letters. Of a message that is too large, only the beginning moves, with the request id if it can be found:
the worker that gets it answers the caller and dead-letters it. Delayed requests that are due come first, the oldest of them
first; then the right ends of the lists. While more messages wait than are taken, every fourth one taken is the queue's newest:
its caller still waits for the reply, while callers behind a long backlog have been answered 6 by the time the worker comes to
them. A delayed request whose entry this release cannot read is left for others: it becomes due again in a second.

KEYS 1 queue       list   producers LPUSH to it
     2 ready       zset   delayed requests that are due: id by birth (ms)
     3 delayed     hash   entry by id, see delayed.lua
     4 suspects    list   suspected poison messages (their worker died twice); only a worker that holds nothing takes one
     5 unacked     hash   tag -> [message, exchange, routing key], as kombu writes it
     6 index       zset   tag by time (s, this server's)
     7 dead        list   dead letters, JSON
     8 due         zset   delayed requests: id by due time (ms)
     9 ...         list   messages of Celery clients with a lower priority
ARGV 1 count       int    messages to take, at most
     2 tag prefix  string unique to this call
     3 task        string the only task that is known
     4 queue name  string
     5 held        int    messages that this worker holds already
     6 code        string of dead letters that name another task
     7 code        string of dead letters whose envelope is malformed
     8 largest     bytes  a larger message is not decoded

Returns {suspects left, 1 if the one taken is a suspect, tag, message, tag, message ...}. For a dead letter the tag is ''
and the message is its code, a space and its reason. In place of a message that is too large stands {headers: {id}, cut: {size
(bytes), message (its beginning)}}; a call that meets one takes few others after it.
A command that is refused (memory, access, a key of another type) does not undo the script. So messages are only read
first, then written to where they go, and only then removed; if they cannot be removed, what was written is taken back.
]]
local time = redis.call('TIME')
local seconds = time[1] + time[2] / 1000000
local score = string.format('%.6f', seconds) -- once: Lua would format a number for each command
local count, prefix, held = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[5])
local UNKNOWN_TASK, ENVELOPE, LARGEST = ARGV[6], ARGV[7], tonumber(ARGV[8])
local KEPT, SEARCHED = 1024, 8192 -- bytes of a message that is too large: how many are kept; how many are searched at each end
local LEFT = 1 -- seconds for which a delayed request is left to other workers
local AT_ONCE = 4 -- messages read by one command: they are copied several times, and each may be of any length
local suspects = redis.call('LLEN', KEYS[4])

local function is_text(value)
    return type(value) == 'string' and value ~= ''
end

-- Why this message cannot be executed: a code and a text; nil if its envelope is sound.
local function fault(message)
    local fine, envelope = pcall(cjson.decode, message)
    if not fine then return ENVELOPE, 'not JSON' end
    if type(envelope) ~= 'table' then return ENVELOPE, 'not a JSON object' end
    if type(envelope.cut) == 'table' then return nil end
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

-- The request id in a part of a message, if the headers and our task's name are there too. Only a text search.
local function id_in(text)
    local headers = string.match(text, '"headers"%s*:%s*{(.*)')
    if headers and string.match(headers, '"task"%s*:%s*"([^"]*)"') == ARGV[3] then
        local id = string.match(headers, '"id"%s*:%s*"([^"\\%c\128-\255]+)"')
        return id and #id <= 255 and id or nil
    end
    return nil
end

-- What is left of a message that is too large, in ASCII: its end may be within a character, and it need not be UTF-8.
local function cut(message)
    local id = id_in(string.sub(message, 1, SEARCHED)) or id_in(string.sub(message, -SEARCHED))
    local beginning = string.gsub(string.sub(message, 1, KEPT), '[\128-\255]', '?')
    return cjson.encode({ headers = { id = id }, cut = { size = #message, message = beginning } })
end

local function refused(answer)
    return type(answer) == 'table' and answer.err
end

local taken = { suspects, 0 }

-- Reads up to `total` messages, a few at a time; `part(from, to)` reads some. Stops soon after one that was cut, so that no call
-- copies many large ones. Returns the messages, how many places were read, and whether one was cut.
local function read(total, part)
    local messages, places, was_cut = {}, 0, false
    while places < total and not was_cut do
        local to = math.min(places + math.min(places + 1, AT_ONCE), total)
        for _, message in ipairs(part(places + 1, to)) do
            if message and #message > LARGEST then
                message, was_cut = cut(message), true
            end
            messages[#messages + 1] = message or nil
        end
        places = to
    end
    return messages, places, was_cut
end

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
    local messages = read(1, function() return { redis.call('LINDEX', KEYS[4], -1) } end)
    return answer(move(messages, { { 'RPOP', KEYS[4] } }))
end

-- Moves messages from the right end of a list, the oldest first. Returns how many, whether one was cut, and the error of a
-- refused command.
local function take_oldest(key, count)
    local messages, places, was_cut = read(count, function(from, to)
        local found, oldest_first = redis.call('LRANGE', key, -to, -from), {}
        for i = #found, 1, -1 do
            oldest_first[#oldest_first + 1] = found[i]
        end
        return oldest_first
    end)
    return places, was_cut, move(messages, { { 'LTRIM', key, 0, -places - 1 } })
end

local room = count
if redis.call('LLEN', KEYS[1]) > count then
    local newest = math.floor((count + time[2] % 4) / 4)
    if newest > 0 then
        local messages, places, was_cut = read(newest, function(from, to)
            return redis.call('LRANGE', KEYS[1], from - 1, to - 1)
        end)
        local error = move(messages, { { 'LTRIM', KEYS[1], places, -1 } })
        if error or was_cut then
            return answer(error)
        end
        room = room - places
    end
end
local due = room > 0 and redis.call('ZRANGE', KEYS[2], 0, room - 1) or {}
if #due > 0 then
    local known, left = {}, {}
    local messages, _, was_cut = read(#due, function(from, to)
        local found = redis.call('HMGET', KEYS[3], unpack(due, from, to))
        for i, entry in ipairs(found) do
            local _, message = read_delayed(entry or '')
            local ids = entry and not message and left or known
            ids[#ids + 1] = due[from + i - 1]
            found[i] = message or false
        end
        return found
    end)
    for _, id in ipairs(left) do
        if not refused(redis.pcall('ZADD', KEYS[8], string.format('%.0f', (seconds + LEFT) * 1000), id)) then
            redis.pcall('ZREM', KEYS[2], id)
        end
    end
    local error = #known > 0 and move(messages, {
        { 'HDEL', KEYS[3], unpack(known) },
        { 'ZREM', KEYS[2], unpack(known) },
    })
    if error or was_cut then
        return answer(error)
    end
    room = room - #messages
end
for i = 1, #KEYS do
    if (i == 1 or i > 8) and room > 0 then
        local found = redis.call('LLEN', KEYS[i])
        if found > 0 then
            local places, was_cut, error = take_oldest(KEYS[i], math.min(found, room))
            if error or was_cut then
                return answer(error)
            end
            room = room - places
        end
    end
end
return taken
