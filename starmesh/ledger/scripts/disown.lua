-- Removes an ownership entry of this epoch or older.
-- KEYS: owner. ARGV: epoch.
local current = redis.call('GET', KEYS[1])
if current then
  local epoch = string.match(current, '^(%d+) ')
  if not epoch then
    return redis.error_reply('INVALID ownership')
  end
  if tonumber(epoch) <= tonumber(ARGV[1]) then
    redis.call('DEL', KEYS[1])
  end
end
return 1
