-- Sums up what waits in lists, without a text leaving the server.
--
-- KEYS  lists of queues. ARGV: most messages to look at in each list; id of a job, or empty.
--
-- Returns, for each list: its length, and of the messages looked at their number, how many of them say how much they hold,
-- the texts and the characters of those; and 1 if the job was met, which ends all. Messages are looked at from the one that is
-- next; of longer lists every so many, so that the sums stand for all. With an id each is looked at, up to the job's own.

local most, wanted = tonumber(ARGV[1]), ARGV[2]

local function number_of(digits)
  return tonumber((digits:gsub(',', ''))) or 0
end

local reply = {}
for number, list in ipairs(KEYS) do
  local length = redis.call('LLEN', list)
  local every = wanted == '' and math.max(1, math.ceil(length / most)) or 1
  local looked_at, said, texts, characters, is_met = 0, 0, 0, 0, 0
  for place = 0, math.min(length, every * most) - 1, every do
    local raw = redis.call('LINDEX', list, -1 - place)
    if not raw then break end
    -- The body comes first, in base64: what is looked for stands behind it.
    local start = raw:find('"', 11, true) or 1
    looked_at = looked_at + 1
    local num_texts, num_characters = raw:match('"argsrepr": ?"([%d,]+) %a+, ([%d,]+) characters"', start)
    if num_texts then
      said, texts, characters = said + 1, texts + number_of(num_texts), characters + number_of(num_characters)
    end
    if wanted ~= '' and raw:find('"id": ?"' .. wanted:gsub('%p', '%%%0') .. '"', start) then
      is_met = 1
      break
    end
  end
  for _, one in ipairs({ length, looked_at, said, texts, characters, is_met }) do reply[#reply + 1] = one end
  if is_met == 1 then break end
end
return reply
