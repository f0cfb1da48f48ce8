--[[
issue: may these requests send now, and which code? One atomic step for each, in their order; begins with each.lua.

KEYS 3i-2 request record  hash    what is remembered of the request id
     3i-1 code            string  the code itself; GateServer reads it
     3i   bucket          string  when the address' bucket is full again (ms)
ARGV 1  lease             ms
     2  give up after     ms
     3  ttl               ms
     4  minimum life      ms
     5  cooldown          ms      0: off, and no joins
     6  interval          ms      one send comes back to the bucket; 0: off
     7  burst             int     the bucket's size
     8  remember          ms      life of the record
     9  record prefix     string  the request id is what follows it in the record's key
     10 attempts prefix   string  + code key: hash    wrong checks of the code
     11 cooldown prefix   string  + code key: string  fingerprint of the code in the last accepted mail
     12 sending prefix    string  + code key: string  id of the request whose mail is on the wire
     13 joined prefix     string  + code key: set     ids of the requests that wait for that mail's outcome
     then six for each request:
     who                  string  hash of address and purpose: the same id must come with the same
     token                string  names this holder of the lease
     verdict              int     an error that is certain already, or ''
     enqueued at          ms      or '' or in the future: then the age counts from the first time the request was seen
     expires at           ms      or ''
     candidate            string  the code to set if there is none

Returns a list with an entry for each request:
        {'send', code, life ms, ms until the deadline, tries so far}
      | {'answered', error, why}   final; also stored in the record; why: 'cooldown', 'bucket' (it is empty) or nothing
      | {'wait', ms}          the same id is being sent by another holder
      | {'join', ms}          another request's mail to the same code key is on the wire
      | {'conflict'}          the id belongs to another address or purpose; nothing was changed
      | an error              of this request alone; what it had written before stays

The record: who, first (ms), token ('': nobody has the lease), until (lease, ms), charged (1: the bucket was), doubts (sends
that may have been accepted), dot (1: the present send wrote its final dot), mark (fingerprint of the code issued), tries,
error (present = answered). Times are this server's. A code, cooldown, sending or bucket that is no string is none, and is
overwritten in its turn.
]]
local call, sha1hex = redis.call, redis.sha1hex
local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease, remember = ARGV[1], ARGV[8]
-- Once: a number that is handed on is written out each time.
local seen, lease_end = string.format('%.0f', now), string.format('%.0f', now + lease)
local give_up_after, min_life = tonumber(ARGV[2]), tonumber(ARGV[4])
local cooldown, interval, burst = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local id_at = #ARGV[9] + 1

return each(#KEYS / 3, function(i)
    local record_key, code_key, bucket_key = KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i]
    local at = 6 * i + 8
    local who, token, verdict = ARGV[at], ARGV[at + 1], ARGV[at + 2]

    local record, flat = {}, call('HGETALL', record_key)
    for n = 1, #flat, 2 do
        record[flat[n]] = flat[n + 1]
    end
    if record.who and record.who ~= who then
        return { 'conflict' }
    end
    if record.error then
        return { 'answered', tonumber(record.error) }
    end

    local first = record.first or seen
    local doubts = (tonumber(record.doubts) or 0) + (tonumber(record.dot) or 0)
    local function answer(error, why)
        if record.charged == '1' and doubts == 0 then
            -- Charged for a send that no relay accepted; the worker that would have said so is gone.
            local full = (tonumber(call('MGET', bucket_key)[1]) or 0) - interval
            if full > now then
                call('SET', bucket_key, full, 'PX', full - now)
            else
                call('DEL', bucket_key)
            end
            call('HSET', record_key, 'charged', '0')
        end
        call('HSET', record_key, 'who', who, 'first', first, 'token', '', 'error', error)
        call('PEXPIRE', record_key, remember)
        return { 'answered', error, why }
    end

    if verdict ~= '' then
        return answer(tonumber(verdict))
    end
    local holder = record.token or ''
    if holder ~= '' and holder ~= token and tonumber(record['until']) > now then
        return { 'wait', record['until'] - now }
    end

    -- A time in the future counts as now, once: as the first time the request was seen, or it would never grow old.
    local born = math.min(tonumber(ARGV[at + 3]) or now, tonumber(first))
    local deadline = math.min(born + give_up_after, tonumber(ARGV[at + 4]) or math.huge)
    if now >= deadline then
        return answer(6)
    end

    local sending_key = ARGV[12] .. code_key
    local found = call('MGET', code_key, ARGV[11] .. code_key, sending_key, bucket_key)
    local code, life, mark = found[1], 0, nil
    if code and code ~= '' then
        life = call('PTTL', code_key)
        mark = life > 0 and sha1hex(code)
    end
    if cooldown > 0 then
        if mark and found[2] == mark then
            return answer(0, 'cooldown')
        end
        local id = string.sub(record_key, id_at)
        if found[3] and found[3] ~= id then
            -- A holder of this request that stood still, if there was one, may not send any more.
            call('HDEL', record_key, 'token', 'until')
            call('HSET', record_key, 'who', who, 'first', first)
            call('PEXPIRE', record_key, remember)
            call('SADD', ARGV[13] .. code_key, id)
            call('PEXPIRE', ARGV[13] .. code_key, remember)
            return { 'join', math.min(call('PTTL', sending_key), deadline - now) }
        end
    end

    -- A mail of this request may have been accepted: once more with the very same code, or not at all.
    if doubts > 0 and (doubts > 1 or not mark or mark ~= record.mark) then
        return answer(6)
    end

    if interval > 0 and record.charged ~= '1' then
        local full = math.max(tonumber(found[4]) or 0, now)
        if full - now > (burst - 1) * interval then
            return answer(4, 'bucket')
        end
        full = full + interval
        call('SET', bucket_key, full, 'PX', full - now)
    end

    if doubts == 0 and (not mark or life < min_life) then
        local replaced = code
        code = ARGV[at + 5]
        life = tonumber(ARGV[3])
        mark = sha1hex(code)
        call('SET', code_key, code, 'PX', life)
        if replaced then
            call('DEL', ARGV[10] .. code_key)
        end
    end

    if record.dot == '1' then
        call('HSET', record_key, 'doubts', doubts, 'dot', '0')
    end
    call('HSET', record_key, 'who', who, 'first', first, 'token', token, 'until', lease_end, 'charged',
        interval > 0 and '1' or '0', 'mark', mark)
    call('PEXPIRE', record_key, remember)
    if cooldown > 0 then
        call('SET', sending_key, string.sub(record_key, id_at), 'PX', lease)
    end
    return { 'send', code, life, deadline - now, tonumber(record.tries) or 0 }
end)
