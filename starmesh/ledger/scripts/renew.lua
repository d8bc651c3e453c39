-- Keeps ownership entries for longer if they are of the given epochs.
-- KEYS: owners. ARGV: ttl_ms, then the epoch of each key.
for i, key in ipairs(KEYS) do
  local current = redis.call('GET', key)
  if current and string.match(current, '^(%d+) ') == ARGV[i + 1] then
    redis.call('PEXPIRE', key, ARGV[1])
  end
end
return 1
