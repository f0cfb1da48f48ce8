--[[
issue: may these requests send now, and which code? One atomic step for each, in their order; begins with each.lua,
buckets.lua, lengths.lua and record.lua.

KEYS 5i-4 request record  hash    what is remembered of the request id
     5i-3 code            string  the code itself; GateServer reads it
     5i-2 bucket          string  the address' bucket, see buckets.lua
     5i-1 suppressed      string  see settle.lua: until its end the address gets no mail
     5i   wrong checks    string  see check.lua: a live code that is too short after so many counts as missing
ARGV 1  lease             ms
     2  give up after     ms
     3  ttl               ms
     4  minimum life      ms
     5  cooldown          ms      0: off, and no joins
     6  remember          ms      life of the record
     7  record prefix     string  a record's key is this and the request id
     8  attempts prefix   string  + code key: hash    wrong checks of the code
     9  cooldown prefix   string  + code key: string  fingerprint of the code in the last accepted mail
     10 sending prefix    string  + code key: string  id of the request whose mail is being sent
     11 joined prefix     string  + code key: set     ids of the requests that wait for that mail's outcome
     12 success           int     error code of a request that meets a cooldown
     13 too many requests int     error code of a request that meets an empty bucket
     14 timeout           int     error code of a request that is given up
     15 mail rejected     int     error code of a request whose address is suppressed
     16 max attempts      int     see lengths.lua
     17 shortest          int     length of a code, in digits
     18 longest           int     likewise
     19 to 22             string  each bucket, in the order of buckets.lua: interval (ms, in which one send comes back)
                                  and burst (the size of the bucket), with a space between; '': not configured
     then seven for each request:
     who                  string  the record's version, a colon, and a hash of address and purpose: the same id must come
                                  with the same
     token                string  names this holder of the lease
     error                int     the final answer if it is certain already, else ''
     enqueued at          ms      if '' or in the future, the age counts from the first time the request was seen
     expires at           ms      or ''
     candidate            string  `longest` random digits; a new code is the first of them, as many as it needs now
     client               string  hash of the caller's word for its end user; '': none, so its buckets do not count

Returns a list with an entry for each request:
        {'send', code, life ms, ms until the deadline, tries so far}
      | {'answered', error, why}   final, and stored in the record; why: 'cooldown', 'suppressed', which bucket is empty
                                   ('address_bucket', 'client_address_bucket', 'client_bucket', 'total_bucket') or nothing
      | {'wait', ms}               another holder is sending the same id
      | {'join', ms}               another request's mail to the same code key is being sent
      | {'conflict'}               the id belongs to another address or purpose; nothing was changed
      | {'unknown', ms}            the record has another version; nothing was changed, and another worker may know it. From
                                   its deadline on, such a request is answered; that is not stored
      | an error                   of this request alone; what was written for it before stays

Fields of the record; who reads or writes them otherwise raises the version (see record.lua):
     who, first (ms), token ('': nobody holds the lease), until (end of the lease, ms), tries
     charged (see buckets.lua), mark (fingerprint of the code that was issued)
     dot (1: the present send was announced: its mail may leave), doubts (earlier sends that may have been accepted)
     error (present: answered)
Times are this server's. A code, cooldown, sending, bucket or suppressed key of another type than string counts as missing
and is overwritten when it is written next.
]]
local LEFT = 1000 -- ms for which a request is left to other workers

local sha1hex = redis.sha1hex
local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease, remember = ARGV[1], ARGV[6]
-- Formatted once: Redis writes out a number anew in each command that it is passed to.
local seen, lease_end = string.format('%.0f', now), string.format('%.0f', now + lease)
local give_up_after, min_life = tonumber(ARGV[2]), tonumber(ARGV[4])
local cooldown, id_at = tonumber(ARGV[5]), #ARGV[7] + 1
local SUCCESS, TOO_MANY_REQUESTS, TIMEOUT = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])
local MAIL_REJECTED = tonumber(ARGV[15])
local attempts, shortest, longest = tonumber(ARGV[16]), tonumber(ARGV[17]), tonumber(ARGV[18])

-- The configured buckets; `charged` is what the record of a request that is charged to them says.
local function configured(with_client)
    local buckets, intervals = { charged = '' }, {}
    for n = 1, (with_client or ARGV[22] ~= '') and 4 or 1 do
        intervals[n] = '0'
        if ARGV[18 + n] ~= '' and (with_client or n == 1 or n == 4) then
            local interval, burst = string.match(ARGV[18 + n], '^(%S+) (%S+)$')
            intervals[n] = interval
            buckets[#buckets + 1] = { n = n, interval = tonumber(interval), most = (burst - 1) * interval, full = 0 }
        end
    end
    buckets.charged = table.concat(intervals, ' ')
    return buckets
end
local without_client, with_client -- each made when it is needed first

return each(#KEYS / 5, function(i)
    local record_key, code_key, address_key = KEYS[5 * i - 4], KEYS[5 * i - 3], KEYS[5 * i - 2]
    local at = 7 * i + 16
    local who, token, known_error = ARGV[at], ARGV[at + 1], ARGV[at + 2]

    local record, flat = {}, call('HGETALL', record_key)
    for n = 1, #flat, 2 do
        record[flat[n]] = flat[n + 1]
    end
    local first = record.first or seen
    -- A time in the future must not postpone the deadline at each retry, so it counts as the first time seen.
    local born = math.min(tonumber(ARGV[at + 3]) or now, tonumber(first) or now)
    local deadline = math.min(born + give_up_after, tonumber(ARGV[at + 4]) or math.huge)
    if record.who and record.who ~= who then
        if same_version(record.who, who) then
            return { 'conflict' }
        elseif now >= deadline then
            return { 'answered', TIMEOUT }
        end
        return { 'unknown', math.min(LEFT, deadline - now) }
    end
    if record.error then
        return { 'answered', tonumber(record.error) }
    end

    local doubts = (tonumber(record.doubts) or 0) + (tonumber(record.dot) or 0)
    local function answer(error, why)
        if (record.charged or '') ~= '' and doubts == 0 then
            -- Charged for a send that no relay accepted, by a worker that died before it could settle that.
            refund(record.charged, address_key)
            call('HSET', record_key, 'charged', '')
        end
        call('HSET', record_key, 'who', who, 'first', first, 'token', '', 'error', error)
        call('PEXPIRE', record_key, remember)
        return { 'answered', error, why }
    end

    if known_error ~= '' then
        return answer(tonumber(known_error))
    end
    local holder = record.token or ''
    if holder ~= '' and holder ~= token and tonumber(record['until']) > now then
        return { 'wait', record['until'] - now }
    end

    if now >= deadline then
        return answer(TIMEOUT)
    end

    local sending_key, client = ARGV[10] .. code_key, ARGV[at + 6]
    local code, mailed, sender, address_full, suppressed, wrong =
        unpack(call('MGET', code_key, ARGV[9] .. code_key, sending_key, address_key, KEYS[5 * i - 1], KEYS[5 * i]))
    local life, mark = 0, nil
    wrong = tonumber(wrong) or 0
    if code and code ~= '' and not too_short(code, wrong, attempts, shortest, longest) then
        life = call('PTTL', code_key)
        mark = life > 0 and sha1hex(code)
    end
    if cooldown > 0 then
        if mark and mailed == mark then
            return answer(SUCCESS, 'cooldown')
        end
        local id = string.sub(record_key, id_at)
        if sender and sender ~= id then
            -- An earlier holder of this request that was frozen may not send any more.
            call('HDEL', record_key, 'token', 'until')
            call('HSET', record_key, 'who', who, 'first', first)
            call('PEXPIRE', record_key, remember)
            call('SADD', ARGV[11] .. code_key, id)
            call('PEXPIRE', ARGV[11] .. code_key, remember)
            return { 'join', math.min(call('PTTL', sending_key), deadline - now) }
        end
    end

    -- A relay may have accepted a mail of this request: send the very same code once more, or give up.
    if doubts > 0 and (doubts > 1 or not mark or mark ~= record.mark) then
        return answer(TIMEOUT)
    end

    if suppressed then
        local until_ms = string.match(suppressed, '^%S+ (%d+) %d+$')
        if until_ms and tonumber(until_ms) > now then
            return answer(MAIL_REJECTED, 'suppressed')
        end
    end

    local charged = record.charged or ''
    if charged == '' then
        local buckets
        if client == '' then
            without_client = without_client or configured(false)
            buckets = without_client
        else
            with_client = with_client or configured(true)
            buckets = with_client
        end
        for n = 1, #buckets do
            local bucket = buckets[n]
            local value = address_full
            if bucket.n > 1 then
                value = call('MGET', bucket_key(bucket.n, address_key, client))[1]
            end
            bucket.full = math.max(tonumber(value) or 0, now)
            if bucket.full - now > bucket.most then
                local names = { 'address_bucket', 'client_address_bucket', 'client_bucket', 'total_bucket' }
                return answer(TOO_MANY_REQUESTS, names[bucket.n])
            end
        end
        for n = 1, #buckets do
            local bucket = buckets[n]
            local full = bucket.full + bucket.interval
            call('SET', bucket_key(bucket.n, address_key, client), full, 'PX', math.ceil(full - now))
        end
        if #buckets > 0 then
            charged = client == '' and buckets.charged or buckets.charged .. ' ' .. client
        end
    end

    if doubts == 0 and (not mark or life < min_life) then
        local replaced = code
        code = string.sub(ARGV[at + 5], 1, length_after(wrong, attempts, shortest, longest))
        life = tonumber(ARGV[3])
        mark = sha1hex(code)
        call('SET', code_key, code, 'PX', life)
        if replaced then
            call('DEL', ARGV[8] .. code_key)
        end
    end

    if record.dot == '1' then
        call('HSET', record_key, 'doubts', doubts, 'dot', '0')
    end
    call('HSET', record_key, 'who', who, 'first', first, 'token', token, 'until', lease_end, 'charged', charged,
        'mark', mark)
    call('PEXPIRE', record_key, remember)
    if cooldown > 0 then
        call('SET', sending_key, string.sub(record_key, id_at), 'PX', lease)
    end
    return { 'send', code, life, deadline - now, tonumber(record.tries) or 0 }
end)
