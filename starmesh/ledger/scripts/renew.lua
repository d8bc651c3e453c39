-- Keeps ownership entries for longer if they are of the given epochs. Returns the places, from 1, of keys without one.
-- KEYS: owners. ARGV: ttl_ms, then the epoch of each key.
local missing = {}
for i, key in ipairs(KEYS) do
  local current = redis.call('GET', key)
  if not current then
    missing[#missing + 1] = i
  elseif string.match(current, '^(%d+) ') == ARGV[i + 1] then
    redis.call('PEXPIRE', key, ARGV[1])
  end
end
return missing
