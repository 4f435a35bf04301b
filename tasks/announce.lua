-- Announces models, unless that would put vectors of two models into one queue.
--
-- KEYS  1 announced models (hash)   2 workers present (hash)
-- ARGV  1 name of the worker, empty for none   2 seconds after which a worker's report counts as gone
--       3 "1" if the worker may replace a revision that others serve   4 seconds after which an announcement that was
--       not renewed counts as gone   from 5 on: announcements as JSON
--
-- Returns nothing, or why not: {"default", alias, kind, the default's alias} or {"revision", alias, a worker that serves
-- the other revision, whether a "revision" or the "shape" differs, the other announcement} or {"precision", alias, a worker
-- that serves it in another precision, the other announcement}. Then nothing is written. Otherwise the announcements are,
-- and a first report of the worker, so that whoever comes next sees it.

local clock = redis.call('time')
local now_s = clock[1] + clock[2] / 1000000

local function records(key)
  local flat, found = redis.call('hgetall', key), {}
  for at = 1, #flat, 2 do
    local is_json, value = pcall(cjson.decode, flat[at + 1])
    if is_json and type(value) == 'table' then found[flat[at]] = value end
  end
  return found
end

local function holds(list, wanted)
  for _, one in pairs(type(list) == 'table' and list or {}) do
    if one == wanted then return true end
  end
  return false
end

local function alike(one, other)
  for _, pair in ipairs({{one, other}, {other, one}}) do
    if type(pair[1]) ~= 'table' then return false end
    for _, value in pairs(pair[1]) do
      if not holds(pair[2], value) then return false end
    end
  end
  return true
end

-- A field that an older worker does not announce says nothing.
local function same(one, other)
  return one == nil or other == nil or one == '' or other == '' or one == other
end

local known, server_of = records(KEYS[1]), {}
for alias, announced in pairs(known) do
  local renewed_s = tonumber(announced.renewed_s) or 0
  if renewed_s > 0 and renewed_s < now_s - tonumber(ARGV[4]) then known[alias] = nil end
end
local reports = records(KEYS[2])
local is_new = reports[ARGV[1]] == nil
for worker, report in pairs(reports) do
  local told_s = tonumber(report.told_s)
  if worker ~= ARGV[1] and told_s and now_s - told_s < tonumber(ARGV[2]) and type(report.models) == 'table' then
    for alias in pairs(report.models) do server_of[alias] = worker end
  end
end

local report = {}
for at = 5, #ARGV do
  local new = cjson.decode(ARGV[at])
  for alias, rival in pairs(known) do
    for _, kind in ipairs(new.default_for) do
      if alias ~= new.alias and holds(rival.default_for, kind) then return {'default', new.alias, kind, alias} end
    end
  end
  local old = known[new.alias]
  if old and server_of[new.alias] then
    local has_shape = old.dimensions == new.dimensions and alike(old.outputs, new.outputs) and alike(old.kinds, new.kinds)
    local is_same = has_shape and same(old.content, new.content) and same(old.reading, new.reading)
    if not is_same and not (has_shape and ARGV[3] == '1') then
      local why = has_shape and 'revision' or 'shape'
      return {'revision', new.alias, server_of[new.alias], why, redis.call('hget', KEYS[1], new.alias)}
    end
    -- Whoever names a precision has decided to mix them; a device that chose its own has not, unless it was there first.
    if is_new and new.is_auto and not same(old.precision, new.precision) then
      return {'precision', new.alias, server_of[new.alias], redis.call('hget', KEYS[1], new.alias)}
    end
  end
  report[new.alias] = {tokens_per_second = 0, tokens_per_job = {}}
end

for at = 5, #ARGV do redis.call('hset', KEYS[1], cjson.decode(ARGV[at]).alias, ARGV[at]) end
if ARGV[1] ~= '' then
  redis.call('hset', KEYS[2], ARGV[1], cjson.encode({told_s = now_s, models = report}))
end
return false
