-- Refuses bodies that the transcoder would take: what is not strict JSON, a key twice (the last would win), a field
-- that there is not (it would be dropped), and nesting that the server cannot decode.

local MAX_DEPTH = 16
local ANY = {}
local find, byte, sub = string.find, string.byte, string.sub
local QUOTE, COMMA, COLON, OPEN_LIST, CLOSE_LIST, OPEN, CLOSE = byte('",:[]{}', 1, 7)

function envoy_on_request(handle)
  local body = handle:body()
  if not body or body:length() == 0 then
    return
  end
  -- The route says which fields there are; one without fields below it may hold anything.
  local ok, complaint = pcall(check, body:getBytes(0, body:length()), handle:filterContext():get("fields"))
  if ok then
    return
  elseif type(complaint) ~= "table" then
    error(complaint)
  end
  handle:respond({[":status"] = "400"}, complaint.sentence)
end

function check(text, known)
  local at = skip(text, 1)
  if byte(text, at) ~= OPEN then
    refuse("The body must be a JSON object: {…}.")
  end
  at = skip(text, object(text, at, known, 1))
  if at <= #text then
    fail(at)
  end
end

-- Each reader takes the position of the first character of its part and returns that after the last.

function object(text, at, known, depth)
  local seen = {}
  at = skip(text, at + 1)
  if byte(text, at) == CLOSE then
    return at + 1
  end
  while true do
    local start = at
    at = quoted(text, start)
    local key = unescaped(sub(text, start + 1, at - 2))
    if seen[key] then
      refuse("The body names " .. shown(key) .. " twice: name it once.")
    elseif next(known) and not known[key] then
      refuse("There is no field " .. shown(key) .. " here. There are " .. names(known) .. ".")
    end
    seen[key] = true
    at = skip(text, at)
    if byte(text, at) ~= COLON then
      fail(at)
    end
    at = skip(text, value(text, skip(text, at + 1), known[key] or ANY, depth + 1))
    local mark = byte(text, at)
    if mark == CLOSE then
      return at + 1
    elseif mark ~= COMMA then
      fail(at)
    end
    at = skip(text, at + 1)
  end
end

function list(text, at, known, depth)
  at = skip(text, at + 1)
  if byte(text, at) == CLOSE_LIST then
    return at + 1
  end
  while true do
    at = skip(text, value(text, at, known, depth + 1))
    local mark = byte(text, at)
    if mark == CLOSE_LIST then
      return at + 1
    elseif mark ~= COMMA then
      fail(at)
    end
    at = skip(text, at + 1)
  end
end

function value(text, at, known, depth)
  local first = byte(text, at)
  if depth > MAX_DEPTH then
    refuse("The body is nested too deeply: use at most " .. MAX_DEPTH .. " levels.")
  elseif first == QUOTE then
    return quoted(text, at)
  elseif first == OPEN then
    return object(text, at, known, depth)
  elseif first == OPEN_LIST then
    return list(text, at, known, depth)
  end
  local _, last = find(text, "^-?%d[%d.eE+-]*", at)
  if not last then
    _, last = find(text, "^[a-z]+", at)
    local word = last and sub(text, at, last)
    if word ~= "true" and word ~= "false" and word ~= "null" then
      fail(at)
    end
  end
  return last + 1
end

function quoted(text, at)
  if byte(text, at) ~= QUOTE then
    fail(at)
  end
  at = find(text, '[%z\1-\31"\\]', at + 1)
  while at and byte(text, at) ~= QUOTE do
    local _, last = find(text, '^\\["\\/bfnrt]', at)
    if not last then
      _, last = find(text, "^\\u%x%x%x%x", at)
    end
    at = last and find(text, '[%z\1-\31"\\]', last + 1) or fail(at)
  end
  return at and at + 1 or fail(#text + 1)
end

function skip(text, at)
  return find(text, "[^ \t\r\n]", at) or #text + 1
end

-- Enough to know a name again: no field and no tag has any other character.
function unescaped(key)
  if not find(key, "\\", 1, true) then
    return key
  end
  key = key:gsub("\\/", "/"):gsub("\\u00([0-7]%x)", function(code) return string.char(tonumber(code, 16)) end)
  return key
end

-- What the client sent is repeated only if it is harmless.
function shown(key)
  return find(key, "^[%w_.-]+$") and #key <= 63 and "'" .. key .. "'" or "a key"
end

function names(known)
  local all = {}
  for name in pairs(known) do
    all[#all + 1] = name
  end
  table.sort(all)
  return table.concat(all, ", ")
end

function fail(at)
  refuse("The body is not valid JSON: see its byte " .. at .. ".")
end

function refuse(sentence)
  error({sentence = sentence})
end
