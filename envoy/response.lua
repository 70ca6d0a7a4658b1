-- What REST says and gRPC has no word for. The server tells it in headers, which a later filter takes away.

-- How the transcoder ends an error without fields, and one that the server's own code did not make.
local NO_FIELDS = ',"fields":[]}'
local NO_CODE = '"code":"","request_id":""' .. NO_FIELDS

function envoy_on_response(handle)
  local headers = handle:headers()
  local status = headers:get("x-http-status")
  if status then
    headers:replace(":status", status)
  end
  if tonumber(headers:get(":status")) >= 400 then
    finish_error(handle)
  end
end

-- Leaves empty fields out, and puts into our own words what gRPC itself refused: its words show the server's insides.
function finish_error(handle)
  local body = handle:body()
  local text = body and body:getBytes(0, body:length()) or ""
  -- Not before body(), which may yield: a header handle that is older than that fails silently.
  local headers = handle:headers()
  if text:sub(-#NO_CODE) == NO_CODE then
    local status = headers:get(":status")
    local code = "internal"
    local sentence = "Something failed on our side: try again, and tell support the request_id if it stays."
    if status == "504" then
      code = "timeout"
      sentence = "The service did not answer in time: try again, and read first whether a write was done."
    elseif status ~= "500" then
      code = "unavailable"
      sentence = "The service cannot answer right now: retry in a moment."
      headers:replace(":status", "503")
      headers:replace("retry-after", "1")
    end
    local request_id = headers:get("x-request-id")
    body:setBytes('{"error":"' .. sentence .. '","code":"' .. code .. '","request_id":"' .. request_id .. '"}')
  elseif text:sub(-#NO_FIELDS) == NO_FIELDS then
    body:setBytes(text:sub(1, -#NO_FIELDS - 1) .. "}")
  end
end
