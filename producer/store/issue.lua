--[[
issue: may these requests send now, and which code? One atomic step for each, in their order; begins with each.lua,
buckets.lua and lengths.lua.

KEYS 5i-4 request record  hash    what is remembered of the request id
     5i-3 code            string  the code itself; GateServer reads it
     5i-2 bucket          string  the address' bucket, see buckets.lua
     5i-1 suppressed      string  see settle.lua; until its end the address gets no mail
     5i   wrong checks    string  see check.lua: a live code that is too short after them counts as missing
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
     12 client prefix     string  + client: string    the client's bucket
     13 total key         string  string              the bucket of everything
     14 success           int     error code of a request that meets a cooldown
     15 too many requests int     error code of a request that meets an empty bucket
     16 timeout           int     error code of a request that is given up
     17 mail rejected     int     error code of a request whose address is suppressed
     18 max attempts      int     see lengths.lua
     19 shortest          int     length of a code, in digits
     20 longest           int     likewise
     21 to 28             two for each bucket, in the order of buckets.lua:
        interval          ms      one send comes back; 0: no such bucket
        burst             int     size of the bucket
     then seven for each request:
     who                  string  hash of address and purpose: the same id must come with the same
     token                string  names this holder of the lease
     error                int     the final answer if it is certain already, else ''
     enqueued at          ms      if '' or in the future, the age counts from the first time the request was seen
     expires at           ms      or ''
     candidate            string  the code to set if there is none to reuse: `longest` digits, of which it takes as
                                  many as a code needs now
     client               string  hash of the caller's word for its end user, or '': then without the client's buckets

Returns a list with an entry for each request:
        {'send', code, life ms, ms until the deadline, tries so far}
      | {'answered', error, why}   final, and stored in the record; why: 'cooldown', 'suppressed', which bucket is empty
                                   ('address_bucket', 'client_address_bucket', 'client_bucket', 'total_bucket') or nothing
      | {'wait', ms}               another holder is sending the same id
      | {'join', ms}               another request's mail to the same code key is being sent
      | {'conflict'}               the id belongs to another address or purpose; nothing was changed
      | an error                   of this request alone; what was written for it before stays

Fields of the record:
     who, first (ms), token ('': nobody holds the lease), until (end of the lease, ms), tries
     charged (see buckets.lua), mark (fingerprint of the code that was issued)
     dot (1: the present send announced its final dot), doubts (earlier sends that may have been accepted)
     error (present: answered)
Times are this server's. A code, cooldown, sending, bucket or suppressed key of another type than string counts as missing
and is overwritten when it is written next.
]]
local sha1hex = redis.sha1hex
local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease, remember = ARGV[1], ARGV[6]
-- Formatted once: Redis writes out a number anew in each command that it is passed to.
local seen, lease_end = string.format('%.0f', now), string.format('%.0f', now + lease)
local give_up_after, min_life = tonumber(ARGV[2]), tonumber(ARGV[4])
local cooldown, id_at = tonumber(ARGV[5]), #ARGV[7] + 1
local client_prefix, total_key = ARGV[12], ARGV[13]
local SUCCESS, TOO_MANY_REQUESTS, TIMEOUT = tonumber(ARGV[14]), tonumber(ARGV[15]), tonumber(ARGV[16])
local MAIL_REJECTED = tonumber(ARGV[17])
local attempts, shortest, longest = tonumber(ARGV[18]), tonumber(ARGV[19]), tonumber(ARGV[20])

-- Those of the buckets with these numbers that are configured, and what the record of a request that they let pass says.
local NAMES = { 'address_bucket', 'client_address_bucket', 'client_bucket', 'total_bucket' }
local function configured(numbers)
    local buckets, intervals = {}, { '0', '0', '0', '0' }
    for _, n in ipairs(numbers) do
        local interval, burst = ARGV[2 * n + 19], ARGV[2 * n + 20]
        if interval ~= '0' then
            buckets[#buckets + 1] = { n = n, why = NAMES[n], interval = tonumber(interval), most = (burst - 1) * interval }
            intervals[n] = interval
        end
    end
    local only_address = #buckets == 1 and buckets[1].n == 1
    buckets.charged = only_address and intervals[1] or #buckets > 0 and table.concat(intervals, ' ') or ''
    return buckets
end
local without_client, with_client = configured({ 1, 4 }), configured({ 1, 2, 3, 4 })

return each(#KEYS / 5, function(i)
    local record_key, code_key, address_key = KEYS[5 * i - 4], KEYS[5 * i - 3], KEYS[5 * i - 2]
    local at = 7 * i + 22
    local who, token, known_error = ARGV[at], ARGV[at + 1], ARGV[at + 2]

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
        if (record.charged or '') ~= '' and doubts == 0 then
            -- Charged for a send that no relay accepted, by a worker that died before it could settle that.
            refund(record.charged, address_key, client_prefix, total_key)
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

    -- A time in the future must not postpone the deadline at each retry, so it counts as the first time seen.
    local born = math.min(tonumber(ARGV[at + 3]) or now, tonumber(first))
    local deadline = math.min(born + give_up_after, tonumber(ARGV[at + 4]) or math.huge)
    if now >= deadline then
        return answer(TIMEOUT)
    end

    local sending_key, client = ARGV[10] .. code_key, ARGV[at + 6]
    local buckets = client == '' and without_client or with_client
    local keys = { code_key, ARGV[9] .. code_key, sending_key, KEYS[5 * i - 1], KEYS[5 * i] }
    local before = #keys
    for n, bucket in ipairs(buckets) do
        keys[before + n] = bucket_key(bucket.n, address_key, client, client_prefix, total_key)
    end
    local found = call('MGET', unpack(keys))
    local code, life, mark = found[1], 0, nil
    local wrong = tonumber(found[5]) or 0
    if code and code ~= '' and not too_short(code, wrong, attempts, shortest, longest) then
        life = call('PTTL', code_key)
        mark = life > 0 and sha1hex(code)
    end
    if cooldown > 0 then
        if mark and found[2] == mark then
            return answer(SUCCESS, 'cooldown')
        end
        local id = string.sub(record_key, id_at)
        if found[3] and found[3] ~= id then
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

    if found[4] then
        local until_ms = string.match(found[4], '^%S+ (%d+) %d+$')
        if until_ms and tonumber(until_ms) > now then
            return answer(MAIL_REJECTED, 'suppressed')
        end
    end

    local charged = record.charged or ''
    if charged == '' and #buckets > 0 then
        local full = {}
        for n, bucket in ipairs(buckets) do
            full[n] = math.max(tonumber(found[before + n]) or 0, now)
            if full[n] - now > bucket.most then
                return answer(TOO_MANY_REQUESTS, bucket.why)
            end
        end
        for n, bucket in ipairs(buckets) do
            full[n] = full[n] + bucket.interval
            call('SET', keys[before + n], full[n], 'PX', math.ceil(full[n] - now))
        end
        charged = client == '' and buckets.charged or buckets.charged .. ' ' .. client
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
