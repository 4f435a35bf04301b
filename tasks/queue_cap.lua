-- Puts messages into the lists of a queue, all of them or, where it would then hold more than it may, none.
--
-- KEYS  the lists of the queue's class, interactive or bulk, whose jobs count together
-- ARGV  most jobs, most bytes (0 for no limit), then for each message the number of its list and the message
--
-- Returns {jobs, bytes} that the queue held; nothing if the messages were put. An empty queue takes any: one that is
-- larger than the limit could never be sent otherwise.

local max_jobs, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local num_jobs, num_bytes = 0, 0
for _, list in ipairs(KEYS) do
  num_jobs = num_jobs + redis.call('LLEN', list)
  -- The server estimates it from some entries; to read all would take as long as the queue is.
  if max_bytes > 0 then num_bytes = num_bytes + (redis.call('MEMORY', 'USAGE', list) or 0) end
end

local more_jobs, more_bytes = 0, 0
for number = 3, #ARGV, 2 do
  more_jobs, more_bytes = more_jobs + 1, more_bytes + #ARGV[number + 1]
end

local is_full = (max_jobs > 0 and num_jobs + more_jobs > max_jobs) or (max_bytes > 0 and num_bytes + more_bytes > max_bytes)
if is_full and num_jobs > 0 then return { num_jobs, num_bytes } end
for number = 3, #ARGV, 2 do
  redis.call('LPUSH', KEYS[tonumber(ARGV[number])], ARGV[number + 1])
end
