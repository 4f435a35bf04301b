-- Cancels jobs: answers each that has no answer, and notes it for the workers, which drop it wherever they meet it.
--
-- KEYS  1 embedq:cancelled, 2 embedq:cancel_words (see workers/broker/transport.lua), 3… the keys of the results
-- ARGV  seconds for which a cancelled job is remembered, most that are, seconds for which results are kept (0 for ever);
--       then for each job its id and the blob that answers it
--
-- Returns for each job 'done' if it has its answer, 'running' if a worker has stored that it runs, else ''.

local CANCELLED, WORDS = KEYS[1], KEYS[2]
local keep_s, max_kept, expires_s = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]

local IS_FINAL = { SUCCESS = true, FAILURE = true, REVOKED = true }

-- Celery packs the state first; a result of megabytes need not be decoded to see it.
local function state_at(key)
  local head = redis.pcall('GETRANGE', key, 0, 24)
  if type(head) ~= 'string' then return nil end
  return head:match('^[\128-\143]\166status[\160-\191](%u+)') or head:match('^{"status": "(%u+)"')
end

local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
-- Later than all others, also after the server's clock was set back: workers ask for what is later than the last they know.
local latest = tonumber(redis.call('ZRANGE', CANCELLED, -1, -1, 'WITHSCORES')[2] or 0)
local score = string.format('%.0f', math.max(now_us, latest + 1))

local reply = {}
for number = 1, #KEYS - 2 do
  local key, id, blob = KEYS[2 + number], ARGV[2 + 2 * number], ARGV[3 + 2 * number]
  local state = state_at(key)
  if state and IS_FINAL[state] then
    reply[number] = 'done'
  else
    reply[number] = state == 'STARTED' and 'running' or ''
    redis.call('ZADD', CANCELLED, score, id)
    redis.call('HDEL', WORDS, id)
    if expires_s == '0' then
      redis.call('SET', key, blob)
    else
      redis.call('SET', key, blob, 'EX', expires_s)
    end
    redis.call('PUBLISH', key, blob)
  end
end
redis.call('ZREMRANGEBYSCORE', CANCELLED, '-inf', string.format('%.0f', now_us - keep_s * 1000000))
redis.call('ZREMRANGEBYRANK', CANCELLED, 0, -1 - max_kept)
return reply
