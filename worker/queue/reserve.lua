--[[
reserve: take up to so many messages, in one atomic step. Each moves to `unacked` and its index as it is: the worker that gets it
reads it, and dead-letters what is malformed. Of a message that is too large, only the beginning moves, with the request id if it
can be found: the worker answers the caller and dead-letters it. Delayed requests that are due come first, the oldest of them
first; then the right ends of the lists. While more messages wait than are taken, every fourth one taken is the queue's newest:
its caller still waits for the reply, while callers behind a long backlog have been answered 6 by the time the worker comes to
them. A delayed request whose entry this release cannot read is left for others: it becomes due again in a second.

KEYS 1 queue       list   producers LPUSH to it
     2 ready       zset   delayed requests that are due: id by birth (ms)
     3 delayed     hash   entry by id, see delayed.lua
     4 suspects    list   suspected poison messages (their worker died twice); only a worker that holds nothing takes one
     5 unacked     hash   tag -> [message, exchange, routing key], as kombu writes it
     6 index       zset   tag by time (s, this server's)
     7 due         zset   delayed requests: id by due time (ms)
     8 waiter      string the worker that waits on the queue
     9 turn        list   an element of it wakes one of the other workers
     10 handover   list   a message that has woken a worker, on its way to that worker's call
     11 ...        list   messages of Celery clients with a lower priority
ARGV 1 count       int    messages to take, at most; 0: this worker waits no longer
     2 tag prefix  string unique to this call
     3 queue name  string
     4 held        int    messages that this worker holds already
     5 largest     bytes  a larger message is cut
     6 task        string a message that is too large has a request id only if it names this task
     7 worker      string unique to the process
     8 life        ms     after which a worker that waited on the queue counts as gone
     9 worth       int    messages that are worth waiting for

One worker at a time waits on the queue, so that a message wakes one and the others sleep. It remains the same one while it wants
enough more messages than it gets; then it leaves the wait to the next.

Returns {suspects left, 1 if the one taken is a suspect, who waits on the queue, tag, message, tag, message ...}. Who waits: 1 this
worker, 0 another one, -1 none. In place of a message that is too large stands {headers: {id}, cut: {size (bytes), message (its
beginning)}}; a call that meets one takes few others after it.
A command that is refused (memory, access, a key of another type) does not undo the script. So messages are only read
first, then written to where they go, and only then removed; if they cannot be removed, what was written is taken back.
]]
local time = redis.call('TIME')
local seconds = time[1] + time[2] / 1000000
-- Rounded up, so that nothing is restored early. Whole, because a small zset keeps its scores as text and reads them one by one:
-- fractions take Redis ten times as long.
local score = string.format('%.0f', math.ceil(seconds))
local count, prefix, held = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[4])
local LARGEST, TASK = tonumber(ARGV[5]), ARGV[6]
local KEPT, SEARCHED = 1024, 8192 -- bytes of a message that is too large: how many are kept; how many are searched at each end
local LEFT = 1 -- seconds for which a delayed request is left to other workers
local AT_ONCE = 4 -- messages read by one command: they are copied several times, and each may be of any length
local suspects = redis.call('LLEN', KEYS[4])

-- The request id in a part of a message, if the headers and our task's name are there too. Only a text search.
local function id_in(text)
    local headers = string.match(text, '"headers"%s*:%s*{(.*)')
    if headers and string.match(headers, '"task"%s*:%s*"([^"]*)"') == TASK then
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

local taken = { suspects, 0, 0 }

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
    local from, payloads, index = #taken, {}, {}
    for _, message in ipairs(messages) do
        local tag = prefix .. #taken
        payloads[#payloads + 1] = tag
        payloads[#payloads + 1] = '[' .. message .. ',"","' .. ARGV[3] .. '"]'
        index[#index + 1] = score
        index[#index + 1] = tag
        taken[#taken + 1] = tag
        taken[#taken + 1] = message
    end
    local error = #payloads > 0 and (refused(redis.pcall('HSET', KEYS[5], unpack(payloads)))
        or refused(redis.pcall('ZADD', KEYS[6], unpack(index))))
        or refused(redis.pcall(unpack(removals[1])))
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
    for i = #taken, from + 1, -1 do
        taken[i] = nil
    end
    return error
end

-- `waits`: whether this worker may wait on the queue.
local function answer(error, waits)
    if error and #taken == 3 then
        return redis.error_reply(error)
    end
    local waiter = redis.call('GET', KEYS[8])
    if waits and (not waiter or waiter == ARGV[7]) then
        local said = refused(redis.pcall('SET', KEYS[8], ARGV[7], 'PX', ARGV[8]))
        if said and #taken == 3 and string.match(said, '^%-?READONLY') then
            return redis.error_reply((string.gsub(said, '^%-', '')))
        end
        taken[3] = said and -1 or 1
    elseif not waiter then
        taken[3] = -1
    elseif waiter == ARGV[7] then
        taken[3] = -1
        redis.pcall('DEL', KEYS[8])
        if redis.call('EXISTS', KEYS[9]) == 0 then
            redis.pcall('RPUSH', KEYS[9], 1)
        end
    end
    return taken
end

if count == 0 then
    local error
    while not error and redis.call('EXISTS', KEYS[10]) == 1 do
        error = refused(redis.pcall('LMOVE', KEYS[10], KEYS[1], 'LEFT', 'RIGHT'))
    end
    return answer(error, false)
end

if suspects > 0 then
    if held > 0 then
        return answer(nil, false)
    end
    taken[2] = 1
    local messages = read(1, function() return { redis.call('LINDEX', KEYS[4], -1) } end)
    return answer(move(messages, { { 'RPOP', KEYS[4] } }), false)
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
local handed = redis.call('LLEN', KEYS[10])
if handed > 0 then
    local places, was_cut, error = take_oldest(KEYS[10], math.min(handed, room))
    if error or was_cut then
        return answer(error, false)
    end
    room = room - places
end
if redis.call('LLEN', KEYS[1]) > room then
    local newest = math.floor((room + time[2] % 4) / 4)
    if newest > 0 then
        local messages, places, was_cut = read(newest, function(from, to)
            return redis.call('LRANGE', KEYS[1], from - 1, to - 1)
        end)
        local error = move(messages, { { 'LTRIM', KEYS[1], places, -1 } })
        if error or was_cut then
            return answer(error, false)
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
        if not refused(redis.pcall('ZADD', KEYS[7], string.format('%.0f', (seconds + LEFT) * 1000), id)) then
            redis.pcall('ZREM', KEYS[2], id)
        end
    end
    local error = #known > 0 and move(messages, {
        { 'HDEL', KEYS[3], unpack(known) },
        { 'ZREM', KEYS[2], unpack(known) },
    })
    if error or was_cut then
        return answer(error, false)
    end
    room = room - #messages
end
for i = 1, #KEYS do
    if (i == 1 or i > 10) and room > 0 then
        local found = redis.call('LLEN', KEYS[i])
        if found > 0 then
            local places, was_cut, error = take_oldest(KEYS[i], math.min(found, room))
            if error or was_cut then
                return answer(error, false)
            end
            room = room - places
        end
    end
end
return answer(nil, room >= tonumber(ARGV[9]))
