-- Changes the owner by compare-and-set. Returns whether it did, and what it found.
-- KEYS: owner. ARGV: ttl_ms, expected ('' for none), ownership.
local current = redis.call('GET', KEYS[1]) or ''
if current ~= ARGV[2] then
  return {0, current}
end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[1])
return {1, current}
