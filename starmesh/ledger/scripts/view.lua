-- Reads all live instances with their reservations at one moment.
-- KEYS: index. ARGV: prefixes of the instance and of the reservations keys, which share the index's hash tag.
-- Returns now_us, then for each instance: id, state, info, load or nil, reported_at_us or nil, and a flat list of the
-- live reservations: request id, tokens, expires_us.
local time = redis.call('TIME')
local now_us = time[1] .. string.format('%06d', time[2])
local now = tonumber(now_us)
local reply = {now_us}
for _, id in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local instance = redis.call('HMGET', ARGV[1] .. id, 'state', 'info', 'load', 'reported_at_us')
  if instance[2] then
    local live = {}
    local entries = redis.call('HGETALL', ARGV[2] .. id)
    for i = 1, #entries, 2 do
      local tokens, expires = string.match(entries[i + 1], '^(%d+) (%d+)$')
      if not tokens then
        return redis.error_reply('INVALID reservation of ' .. id)
      end
      if tonumber(expires) > now then
        live[#live + 1] = entries[i]
        live[#live + 1] = tokens
        live[#live + 1] = expires
      end
    end
    reply[#reply + 1] = {id, instance[1], instance[2], instance[3], instance[4], live}
  else
    redis.call('SREM', KEYS[1], id)
  end
end
return reply
