-- What must happen at once on the server between a queue and a worker. Runs one operation per call.
--
-- ARGV  the operation's name, then its arguments (see each operation below)
-- KEYS  of kombu, whose layout stock workers and tools read and write too:
--         1  unacked        hash    delivery tag -> '[message, exchange, routing key]'
--         2  unacked_index  zset    delivery tag, scored by when it was taken or last renewed (seconds)
--       our own:
--         3  embedq:jobs    hash    delivery tag -> one line per delivery that was not given back, the
--                                   last one being the present holder's:
--                                   taken (us) TAB lease (s) TAB bytes TAB worker TAB list
--         4  embedq:dead    stream  dead letters: reason, detail, list, tag, deliveries, message, and the version of
--                                   embedq in the worker that buried it
--         5  embedq:delayed zset    delivery tag of a job that waits for its ETA here, because the worker
--                                   that met it holds as many such jobs as it may; scored by the ETA (seconds)
--         6  embedq:delayed_jobs hash   delivery tag -> list TAB message
--         7  embedq:cancelled zset  id of a cancelled job, scored by when it was cancelled (us); forgotten after a week
--         8  embedq:cancel_words hash   id of a cancelled job -> what a worker found it as, "running" or "waiting", once its
--                                   place is free; the key is gone an hour after the last of them
--         9  embedq:cancel_scans hash   list -> the last cancellation (us) for which its messages were looked through
--         10… the lists of the queues, in the order in which they are to be emptied (only for "fetch" and "cancelled")
--
-- Order of writes: first where a job goes, then where it comes from. A script that the server refuses
-- or breaks off half-way (out of memory, a key of another type) then leaves a job twice, never not at all.
--
-- Times are the server's, so that workers whose clocks differ agree about a lease.
--
-- VERSION is embedq's; `workers/broker/leases.py` sets it in a line before these.

local UNACKED, INDEX, JOBS, DEAD, DELAYED, DELAYED_JOBS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local CANCELLED, CANCEL_WORDS, CANCEL_SCANS = KEYS[7], KEYS[8], KEYS[9]
local FIRST_LIST = 10

-- Messages looked at in one call, good and bad: bounds how long the server does nothing else.
local MAX_LOOKED_AT = 1000

-- Bytes given back in one call, for the same reason; the caller asks again while there is more.
local MAX_BYTES_GIVEN_BACK = 64 * 1024 * 1024

-- Jobs that return to their lists in one call because their ETA is near, for the same reason.
local MAX_RETURNED = 256

-- A job whose ETA is nearer than this is taken, whatever its ETA: workers look once a second, and hold it until the
-- very moment by their own clocks.
local EARLY_S = 2

-- Messages and bytes looked through for cancelled jobs in one call, messages at a time and messages taken, for the same
-- reason. What lies beyond is met by a fetch; it is not found at once, and not computed either.
local MAX_SCANNED, MAX_BYTES_SCANNED, SCANNED_AT_ONCE, MAX_CANCELLED = 10000, 64 * 1024 * 1024, 100, 256

-- Seconds after which nobody waits any more for what workers found cancelled jobs as.
local WORDS_S = 3600

-- A delivery tag is a uuid. Anything much longer is no tag, and would be kept as a key three times over;
-- nor is anything but printable ASCII, which workers could not even name in their logs.
local MAX_TAG_BYTES = 256
local NOT_OF_A_TAG = '[^\33-\126]'

local function now_us()
  local now = redis.call('TIME')
  return tonumber(now[1]) * 1000000 + tonumber(now[2])
end

local function seconds(us)
  return string.format('%.6f', us / 1000000)
end

-- The last delivery of a job's lines; nil if they are none of ours, which is as if there were no record.
local function holder(lines)
  local taken, lease, bytes, worker, list = lines:match('(%d+)\t([%d.]+)\t(%d+)\t([^\t\n]*)\t([^\n]*)$')
  if not taken or not tonumber(lease) then return nil end
  return { taken = tonumber(taken), lease = tonumber(lease), bytes = tonumber(bytes), worker = worker, list = list }
end

local function count_lines(lines)
  if lines == '' then return 0 end
  local _, breaks = lines:gsub('\n', '')
  return breaks + 1
end

-- The message as it was in its list, out of kombu's '[message, exchange, routing key]'.
local function message_of(value, bytes)
  return value:sub(2, 1 + bytes)
end

local function bury(reason, detail, list, tag, lines, message, max_dead)
  redis.call('XADD', DEAD, 'MAXLEN', max_dead, '*', 'reason', reason, 'detail', detail, 'list', list,
    'tag', tag, 'deliveries', lines, 'message', message, 'version', VERSION)
end

local function forget(tag)
  redis.call('ZREM', INDEX, tag)
  redis.call('HDEL', UNACKED, tag)
end

-- The envelope without its body, decoded. kombu writes the body first and in base64: cutting it out
-- spares the server a walk through megabytes. A body with an escape in it is decoded with the rest.
local function decoded(raw)
  local _, start = raw:find('^{"body": "')
  if start then
    local stop = raw:find('"', start + 1, true)
    local escape = raw:find('\\', start + 1, true)
    if stop and not (escape and escape < stop) then
      raw = raw:sub(1, start) .. raw:sub(stop)
    end
  end
  return cjson.decode(raw)
end

-- Days from 1970-01-01 to a date; counts years from March, so that the leap day is the last.
local function days(year, month, day)
  if month <= 2 then year, month = year - 1, month + 12 end
  local leap_days = math.floor(year / 4) - math.floor(year / 100) + math.floor(year / 400)
  return 365 * year + leap_days + math.floor((153 * (month - 3) + 2) / 5) + day - 719469
end

-- The ETA of a job in seconds since 1970; 0 without one, or if it names no time zone: the worker holds such a job.
local function eta_of(message)
  local eta = type(message.headers) == 'table' and message.headers.eta
  if type(eta) ~= 'string' then return 0 end
  local year, month, day, hour, minute, second, zone =
    eta:match('^(%d%d%d%d)-(%d%d)-(%d%d)[T ](%d%d):(%d%d):(%d%d%.?%d*)(.*)$')
  if zone == 'Z' then zone = '+00:00' end
  local sign, zone_hour, zone_minute = (zone or ''):match('^([+-])(%d%d):?(%d%d)$')
  if not sign then return 0 end
  local offset = 3600 * zone_hour + 60 * zone_minute
  local at = 86400 * days(tonumber(year), tonumber(month), tonumber(day)) + 3600 * hour + 60 * minute + second
  return sign == '+' and at - offset or at + offset
end

-- Returns the delivery tag, the end of kombu's entry, the ETA and the job's id; or nil and why it is no message.
local function read_envelope(raw, max_bytes)
  if #raw > max_bytes then
    return nil, 'larger than ' .. max_bytes .. ' bytes'
  end
  local is_json, message = pcall(decoded, raw)
  if not is_json or type(message) ~= 'table' or message[1] ~= nil then return nil, 'not a JSON object' end
  local properties = message.properties
  if type(properties) ~= 'table' then return nil, 'no properties' end
  local tag = properties.delivery_tag
  if type(tag) ~= 'string' or tag == '' or #tag > MAX_TAG_BYTES or tag:find(NOT_OF_A_TAG) then
    return nil, 'no delivery tag'
  end
  local info = type(properties.delivery_info) == 'table' and properties.delivery_info or {}
  local exchange = type(info.exchange) == 'string' and info.exchange or ''
  local routing_key = type(info.routing_key) == 'string' and info.routing_key or ''
  local id = type(message.headers) == 'table' and message.headers.id
  local rest = ', ' .. cjson.encode(exchange) .. ', ' .. cjson.encode(routing_key) .. ']'
  return tag, rest, eta_of(message), type(id) == 'string' and id or nil
end

-- A line of JOBS for a delivery to a worker.
local function line_of(taken_us, lease, raw, worker, list)
  return string.format('%.0f\t%s\t%d\t%s\t%s', taken_us, lease, #raw, worker, list)
end

-- Moves delayed jobs back to the heads of their lists, the earliest to be taken first: those whose ETA is near, and as
-- many others of the lists of this call as the worker may hold. So jobs are delayed here only while workers hold some.
local function return_delayed(now_s, max_delayed)
  if redis.call('EXISTS', DELAYED) == 0 then return end
  local first = redis.call('ZRANGE', DELAYED, 0, MAX_RETURNED - 1, 'WITHSCORES')
  local is_asked, returned, bytes = {}, {}, 0
  for number = FIRST_LIST, #KEYS do is_asked[KEYS[number]] = true end
  for number = 1, #first, 2 do
    local tag, is_near = first[number], tonumber(first[number + 1]) <= now_s + EARLY_S
    local list, raw = (redis.call('HGET', DELAYED_JOBS, tag) or ''):match('^([^\t]*)\t(.*)$')
    if not list then
      redis.call('ZREM', DELAYED, tag)
    elseif is_near or (max_delayed > 0 and is_asked[list]) then
      returned[#returned + 1] = { tag = tag, list = list, raw = raw }
      if not is_near then max_delayed = max_delayed - 1 end
      bytes = bytes + #raw
      if bytes > MAX_BYTES_GIVEN_BACK then break end
    end
  end
  for number = #returned, 1, -1 do
    local job = returned[number]
    redis.call('RPUSH', job.list, job.raw)
    redis.call('ZREM', DELAYED, job.tag)
    redis.call('HDEL', DELAYED_JOBS, job.tag)
  end
end

-- fetch worker lease_s max_jobs max_bytes max_message_bytes max_attempts may_be_alone max_dead
--       max_delayed num_part_lists max_parts
--
-- The first num_part_lists lists hold parts of datasets, of which at most max_parts are taken in all.
-- Takes from the lists in their order. Returns {state, list index, tag, earlier deliveries, message, 1 if cancelled, …}
-- with state 0: the lists are empty, and the connection will be told of the next message if it tracks;
-- 1: there may be more; 2: next is a job whose last attempt this would be, for a worker that holds
-- nothing else (may_be_alone = 1); 3: the one job returned is such a job.
--
-- A job that died with its worker in all attempts but one is delivered alone: were it delivered with
-- the neighbours it crashed with, all of them would die with it again and be buried as one.
--
-- Of jobs whose ETA is not near at most max_delayed are taken; others are delayed here, where they keep nobody waiting. A
-- cancelled job is taken whatever its ETA and attempts: its worker only says so.
local function fetch()
  local worker, lease = ARGV[2], ARGV[3]
  local max_jobs, max_bytes, max_message_bytes = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
  local max_attempts, may_be_alone, max_dead = tonumber(ARGV[7]), ARGV[8] == '1', ARGV[9]
  local max_delayed = tonumber(ARGV[10])
  local last_part_list, parts_left = FIRST_LIST - 1 + tonumber(ARGV[11] or 0), tonumber(ARGV[12] or 0)
  local reply, state = { 0 }, 0
  local now = now_us()
  return_delayed(now / 1000000, max_delayed)
  local may_be_cancelled = redis.call('EXISTS', CANCELLED) == 1
  if redis.call('EXISTS', unpack(KEYS, FIRST_LIST)) == 0 then return reply end

  local taken, bytes, looked_at = 0, 0, 0
  for number = FIRST_LIST, #KEYS do
    local list = KEYS[number]
    local unacked, index, jobs, has_tag, seen = {}, {}, {}, {}, 0
    local delayed, delayed_jobs = {}, {}
    local is_of_parts = number <= last_part_list
    while state == 0 and not (is_of_parts and parts_left < 1) do
      local raw = redis.call('LINDEX', list, -1 - seen)
      if not raw then break end
      local tag, rest, eta, id = read_envelope(raw, max_message_bytes)
      local is_cancelled = may_be_cancelled and id and redis.call('ZSCORE', CANCELLED, id)
      if is_cancelled then eta = 0 end
      if tag and (has_tag[tag] or redis.call('HEXISTS', UNACKED, tag) == 1
          or redis.call('HEXISTS', DELAYED_JOBS, tag) == 1) then
        tag, rest = nil, 'a second message with the delivery tag of a job in flight'
      end
      if not tag then
        bury(rest, '', list, '', '', #raw > max_message_bytes and '' or raw, max_dead)
      elseif eta > now / 1000000 + EARLY_S and max_delayed < 1 then
        has_tag[tag] = true
        delayed[#delayed + 1], delayed[#delayed + 2] = string.format('%.6f', eta), tag
        delayed_jobs[#delayed_jobs + 1], delayed_jobs[#delayed_jobs + 2] = tag, list .. '\t' .. raw
      else
        local lines = redis.call('HGET', JOBS, tag) or ''
        local is_last = max_attempts > 1 and count_lines(lines) == max_attempts - 1 and not is_cancelled
        if taken >= max_jobs or (taken > 0 and bytes + #raw > max_bytes) then
          state = 1
          break
        elseif is_last and (taken > 0 or not may_be_alone) then
          state = 2
          break
        end
        local line = line_of(now + taken, lease, raw, worker, list)
        has_tag[tag] = true
        unacked[#unacked + 1], unacked[#unacked + 2] = tag, '[' .. raw .. rest
        index[#index + 1], index[#index + 2] = seconds(now), tag
        jobs[#jobs + 1], jobs[#jobs + 2] = tag, lines == '' and line or lines .. '\n' .. line
        local n = #reply
        reply[n + 1], reply[n + 2], reply[n + 3], reply[n + 4] = number - FIRST_LIST, tag, lines, raw
        reply[n + 5] = is_cancelled and 1 or 0
        if is_cancelled then
          redis.call('HSET', CANCEL_WORDS, id, 'waiting')
          redis.call('EXPIRE', CANCEL_WORDS, WORDS_S)
        end
        taken, bytes = taken + 1, bytes + #raw
        if eta > now / 1000000 + EARLY_S then max_delayed = max_delayed - 1 end
        if is_of_parts then parts_left = parts_left - 1 end
        if is_last then state = 3 end
      end
      seen, looked_at = seen + 1, looked_at + 1
      if state == 0 and looked_at >= MAX_LOOKED_AT then state = 1 end
    end
    if #unacked > 0 then
      redis.call('HSET', UNACKED, unpack(unacked))
      redis.call('ZADD', INDEX, unpack(index))
      redis.call('HSET', JOBS, unpack(jobs))
    end
    if #delayed > 0 then
      redis.call('HSET', DELAYED_JOBS, unpack(delayed_jobs))
      redis.call('ZADD', DELAYED, unpack(delayed))
    end
    if seen > 0 then redis.call('LTRIM', list, 0, -1 - seen) end
    if state ~= 0 then break end
  end
  -- Read after the writes: a connection that tracks is told of changes after its last read only.
  if state == 0 then redis.call('EXISTS', unpack(KEYS, FIRST_LIST)) end
  reply[1] = state
  return reply
end

-- The ids that were cancelled after `since`, as a set; empty where nobody need look for them in this list.
local function to_look_for(list, ids, scores, since)
  local scanned, wanted = tonumber(redis.call('HGET', CANCEL_SCANS, list) or since), {}
  for number, id in ipairs(ids) do
    if tonumber(scores[number]) > scanned then wanted[id] = true end
  end
  return wanted
end

-- Takes the messages of these jobs out of a list, as "fetch" does, for a worker that says they are cancelled. Returns whether
-- there may be more.
local function take_cancelled(number, wanted, reply, seen)
  local list, worker, lease, max_bytes = KEYS[number], ARGV[2], ARGV[3], tonumber(ARGV[4])
  local gone, now, at, taken = '\0embedq: cancelled', now_us(), 0, 0
  while seen.messages < MAX_SCANNED and seen.bytes < MAX_BYTES_SCANNED and seen.taken < MAX_CANCELLED do
    local slice = redis.call('LRANGE', list, at - SCANNED_AT_ONCE, at - 1)
    if #slice == 0 then break end
    for place = #slice, 1, -1 do
      local raw = slice[place]
      seen.messages, seen.bytes = seen.messages + 1, seen.bytes + #raw
      -- The first id behind the body is the job's in whatever Celery sends: nothing else is decoded.
      local id = raw:match('"id": ?"([^"]+)"', raw:find('"', 11, true) or 1)
      local tag, rest, _, its_id = nil, nil, nil, nil
      if id and wanted[id] then tag, rest, _, its_id = read_envelope(raw, max_bytes) end
      if tag and its_id == id and redis.call('HEXISTS', UNACKED, tag) == 0 and seen.taken < MAX_CANCELLED then
        local lines = redis.call('HGET', JOBS, tag) or ''
        local line = line_of(now + seen.taken, lease, raw, worker, list)
        redis.call('HSET', UNACKED, tag, '[' .. raw .. rest)
        redis.call('ZADD', INDEX, seconds(now), tag)
        redis.call('HSET', JOBS, tag, lines == '' and line or lines .. '\n' .. line)
        redis.call('HSET', CANCEL_WORDS, id, 'waiting')
        redis.call('LSET', list, at - 1 - (#slice - place), gone)
        local n = #reply
        reply[n + 1], reply[n + 2], reply[n + 3], reply[n + 4], reply[n + 5] = number - FIRST_LIST, tag, lines, raw, 1
        seen.taken, taken = seen.taken + 1, taken + 1
      end
    end
    at = at - #slice
  end
  if taken > 0 then
    redis.call('LREM', list, 0, gone)
    redis.call('EXPIRE', CANCEL_WORDS, WORDS_S)
  end
  return seen.taken >= MAX_CANCELLED
end

-- cancelled worker lease_s max_message_bytes since_us
--   -> {when the last job was cancelled (us), whether there are more, {id…}, list index, tag, deliveries, message, 1, …}
--
-- The jobs that were cancelled after `since_us`, which is negative where only the time is wanted. Their messages, as far as
-- they still wait, are taken out of the lists of this call; of all workers the first to come looks for them.
local function cancelled()
  local since = tonumber(ARGV[5])
  local latest = redis.call('ZRANGE', CANCELLED, -1, -1, 'WITHSCORES')[2] or '0'
  local reply = { latest, 0, {} }
  if since < 0 or tonumber(latest) <= since then return reply end
  local found, ids, scores = redis.call('ZRANGE', CANCELLED, '(' .. ARGV[5], '+inf', 'BYSCORE', 'WITHSCORES'), {}, {}
  for number = 1, #found, 2 do ids[#ids + 1], scores[#scores + 1] = found[number], found[number + 1] end
  reply[3] = ids
  local seen = { messages = 0, bytes = 0, taken = 0 }
  for number = FIRST_LIST, #KEYS do
    local wanted = to_look_for(KEYS[number], ids, scores, since)
    if next(wanted) then
      if take_cancelled(number, wanted, reply, seen) then
        reply[2] = 1
        break
      end
      redis.call('HSET', CANCEL_SCANS, KEYS[number], latest)
      redis.call('EXPIRE', CANCEL_SCANS, WORDS_S)
    end
  end
  return reply
end

-- say id word… : tells whoever cancelled these jobs what they were found as
local function say()
  redis.call('HSET', CANCEL_WORDS, unpack(ARGV, 2))
  redis.call('EXPIRE', CANCEL_WORDS, WORDS_S)
end

-- renew worker tag… -> the tags that this worker no longer holds
local function renew()
  local lost, index, now = {}, {}, seconds(now_us())
  for number = 3, #ARGV do
    local tag = ARGV[number]
    local lines = redis.call('HGET', JOBS, tag)
    local last = lines and holder(lines)
    if last and last.worker == ARGV[2] and redis.call('ZSCORE', INDEX, tag) then
      index[#index + 1], index[#index + 2] = now, tag
    else
      lost[#lost + 1] = tag
    end
  end
  if #index > 0 then redis.call('ZADD', INDEX, 'XX', unpack(index)) end
  return lost
end

-- ack worker tag…
--
-- Forgets jobs that are done. One whose lease ran out meanwhile is left to whoever holds it by now, or
-- to its list, with its attempts: its next delivery then finds the result, and is not computed again.
local function ack()
  local tags = { unpack(ARGV, 3) }
  local lines, scores = redis.call('HMGET', JOBS, unpack(tags)), redis.call('ZMSCORE', INDEX, unpack(tags))
  local done = {}
  for number, tag in ipairs(tags) do
    local last = lines[number] and holder(lines[number])
    local is_ours = not last or last.worker == ARGV[2]
    if scores[number] and is_ours then done[#done + 1] = tag end
  end
  if #done > 0 then
    redis.call('ZREM', INDEX, unpack(done))
    redis.call('HDEL', UNACKED, unpack(done))
    redis.call('HDEL', JOBS, unpack(done))
  end
end

-- give_back worker tag… (latest taken first) -> the tags in flight that were not taken by "fetch"
--
-- Each job goes to the head of the list it came from, and its delivery does not count as an attempt.
-- A job that another worker holds by now is left with it.
local function give_back()
  local foreign = {}
  for number = 3, #ARGV do
    local tag = ARGV[number]
    local lines, value = redis.call('HGET', JOBS, tag), redis.call('HGET', UNACKED, tag)
    local last = lines and holder(lines)
    if value and last and last.worker == ARGV[2] then
      redis.call('RPUSH', last.list, message_of(value, last.bytes))
      forget(tag)
      local earlier = lines:match('^(.*)\n[^\n]*$')
      if earlier then redis.call('HSET', JOBS, tag, earlier) else redis.call('HDEL', JOBS, tag) end
    elseif value and not last then
      foreign[#foreign + 1] = tag
    end
  end
  return foreign
end

-- The records of a job that a stock worker finished, or that was purged in its queue, stay behind.
-- Looks at some of all records and forgets those; returns where to look on.
local function tidy(cursor, before_us)
  local scanned = redis.call('HSCAN', JOBS, cursor, 'COUNT', 100)
  for number = 1, #scanned[2], 2 do
    local tag = scanned[2][number]
    local last = holder(scanned[2][number + 1])
    if (not last or last.taken < before_us) and redis.call('HEXISTS', UNACKED, tag) == 0
        and redis.call('HEXISTS', DELAYED_JOBS, tag) == 0 then
      redis.call('HDEL', JOBS, tag)
    end
  end
  return scanned[1]
end

-- Puts jobs back at the heads of their lists, in the order in which they were taken; their deliveries count as attempts.
-- Returns how many: a call stops where they are too large for one.
local function put_back(jobs)
  table.sort(jobs, function(one, other) return one.taken > other.taken end)
  local bytes = 0
  for number, job in ipairs(jobs) do
    if bytes > MAX_BYTES_GIVEN_BACK then return number - 1 end
    local value = redis.call('HGET', UNACKED, job.tag)
    if value then redis.call('RPUSH', job.list, message_of(value, job.bytes)) end
    forget(job.tag)
    bytes = bytes + job.bytes
  end
  return #jobs
end

-- expire lease_s foreign_lease_s record_s cursor
--   -> {given back, whether there is more, the next cursor, {tags of stock workers …}}
--
-- Gives back what nobody renewed for its lease, in the order in which it was taken. What a stock
-- worker took is not ours to give back before kombu's own default timeout.
local function expire()
  local now = now_us()
  local found = redis.call('ZRANGE', INDEX, '-inf', seconds(now - tonumber(ARGV[2]) * 1000000), 'BYSCORE', 'WITHSCORES')
  local expired, foreign = {}, {}
  for number = 1, #found, 2 do
    local tag, age_s = found[number], now / 1000000 - tonumber(found[number + 1])
    local lines = redis.call('HGET', JOBS, tag)
    local last = lines and holder(lines)
    if not last then
      if age_s > tonumber(ARGV[3]) then foreign[#foreign + 1] = tag end
    elseif age_s > last.lease then
      last.tag = tag
      expired[#expired + 1] = last
    end
  end
  local given_back = put_back(expired)
  local cursor = tidy(ARGV[5], now - tonumber(ARGV[4]) * 1000000)
  return { given_back, given_back < #expired and 1 or 0, cursor, foreign }
end

-- abandon worker place -> {given back, the place to look on from, or -1}
--
-- Gives back what a process holds that has ended, without waiting for its leases. Looks at some of all jobs in flight.
local function abandon()
  local place = tonumber(ARGV[3])
  local tags = redis.call('ZRANGE', INDEX, place, place + MAX_LOOKED_AT - 1)
  if #tags == 0 then return { 0, -1 } end
  local lines, held = redis.call('HMGET', JOBS, unpack(tags)), {}
  for number, tag in ipairs(tags) do
    local last = lines[number] and holder(lines[number])
    if last and last.worker == ARGV[2] then
      last.tag = tag
      held[#held + 1] = last
    end
  end
  local given_back = put_back(held)
  if given_back < #held then return { given_back, place } end
  return { given_back, #tags == MAX_LOOKED_AT and place + #tags - given_back or -1 }
end

-- bury max_dead tag reason detail -> 1, or 0 if the job is not in flight
local function bury_one()
  local tag = ARGV[3]
  local value, lines = redis.call('HGET', UNACKED, tag), redis.call('HGET', JOBS, tag) or ''
  if not value then return 0 end
  local last = holder(lines) or { list = '', bytes = #value - 2 }
  bury(ARGV[4], ARGV[5], last.list, tag, lines, message_of(value, last.bytes), ARGV[2])
  forget(tag)
  redis.call('HDEL', JOBS, tag)
  return 1
end

local operations = {
  fetch = fetch, cancelled = cancelled, say = say, renew = renew, ack = ack, give_back = give_back, expire = expire,
  abandon = abandon, bury = bury_one,
}
return operations[ARGV[1]]()
