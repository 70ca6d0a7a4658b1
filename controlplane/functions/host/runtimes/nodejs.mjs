// Runs a customer's Node.js functions in the sandbox. How the host speaks: see python3.py.

import { spawnSync } from "node:child_process";
import fs from "node:fs";
import { register } from "node:module";
import net from "node:net";
import path from "node:path";
import { pathToFileURL } from "node:url";

const TOO_LARGE = 6 << 20; // bytes of an answer
const LONGEST_MESSAGE = 4_000;
const LONGEST_TRACE = 16_000;
const HEADER = 9;
const CODE = "/code";
const IS_MODULE = /^\s*(?:import|export)\b\s*[\w{*"']/m;

class Failure extends Error {
  constructor(message, kind = "error") {
    super(message);
    this.kind = kind;
  }
}

// What a handler learns of its call, besides the event; each name also as AWS has it: functionName.
class Context {
  #end;

  constructor({ remaining_ms: remaining, ...facts }) {
    this.#end = performance.now() + remaining;
    for (const [name, value] of Object.entries({ ...facts, aws_request_id: facts.request_id })) {
      this[name] = value;
      this[name.replace(/_mb$/, "MB").replace(/_([a-z])/g, (_, letter) => letter.toUpperCase())] = value;
    }
  }

  getRemainingTimeInMillis() {
    return Math.max(0, Math.floor(this.#end - performance.now()));
  }

  get_remaining_time_in_millis() {
    return this.getRemainingTimeInMillis();
  }
}

const channel = new net.Socket({ fd: 3, readable: true, writable: true });
let current = 0; // the call that is being answered

function send(kind, number, body) {
  const header = Buffer.alloc(HEADER);
  header.write(kind, "latin1");
  header.writeUInt32BE(number, 1);
  header.writeUInt32BE(body.length, 5);
  channel.cork();
  channel.write(header);
  channel.write(body);
  channel.uncork();
}

function fail(number, error, then) {
  const kind = error instanceof Failure ? error.kind : "error";
  const failure = { kind, message: describe(error), trace: error instanceof Failure ? null : trace(error) };
  send("X", number, Buffer.from(JSON.stringify(failure)));
  if (then) channel.end(then);
}

function describe(error) {
  if (error instanceof Failure) return error.message;
  const text = error instanceof Error ? `${error.name}: ${error.message}` : `It threw ${String(error)}`;
  return text.slice(0, LONGEST_MESSAGE);
}

// The stack without our frames and those of Node.js.
function trace(error) {
  if (typeof error?.stack !== "string") return null;
  const lines = error.stack.split("\n").filter((line) => !/\/runtime\/|\(?node:internal/.test(line));
  return lines.join("\n").replaceAll(`file://${CODE}`, CODE).slice(0, LONGEST_TRACE);
}

async function load(entrypoint) {
  const dot = entrypoint.lastIndexOf(".");
  const [file, name] = [entrypoint.slice(0, dot), entrypoint.slice(dot + 1)];
  const place = ["mjs", "js", "cjs"].map((end) => path.join(CODE, `${file}.${end}`)).find((each) => fs.existsSync(each));
  if (!place) throw new Failure(`The code has no file ${file}.mjs, .js or .cjs, which the entrypoint ${entrypoint} names.`);
  // Since 20.19 Node.js itself sees that a .js file is an ES module.
  if (!process.features.require_module && IS_MODULE.test(fs.readFileSync(place, "utf8"))) recogniseModules();
  const exported = await import(pathToFileURL(place)).catch((error) => {
    throw error instanceof SyntaxError ? located(error, place) : error;
  });
  const handler = exported[name] ?? exported.default?.[name];
  if (typeof handler !== "function") {
    throw new Failure(`${path.basename(place)} exports no function ${name}, which the entrypoint names.`);
  }
  return handler;
}

function recogniseModules() {
  const hook = `
    import fs from "node:fs";
    export async function load(url, context, next) {
      const isOwn = url.startsWith("file://${CODE}/") && !url.includes("/node_modules/");
      if (!isOwn || !url.endsWith(".js")) return next(url, context);
      const source = fs.readFileSync(new URL(url), "utf8");
      return ${IS_MODULE}.test(source) ? { format: "module", source, shortCircuit: true } : next(url, context);
    }`;
  register(`data:text/javascript,${encodeURIComponent(hook)}`);
}

// A syntax error does not say where it is; Node.js tells only if asked to check the file.
function located(error, place) {
  const { stderr } = spawnSync(process.execPath, ["--check", place], { encoding: "utf8" });
  if (stderr) error.stack = stderr.split("\nNode.js")[0].trim();
  return error;
}

async function answer(handler, event, context) {
  const result = await handler(JSON.parse(event), context);
  const text = encode(result === undefined ? null : result);
  const body = Buffer.from(text);
  if (body.length > TOO_LARGE) {
    throw new Failure(`The answer has ${body.length} bytes: at most ${TOO_LARGE} are allowed.`, "too_large");
  }
  return body;
}

function encode(result) {
  let text;
  try {
    text = JSON.stringify(result);
  } catch (error) {
    throw new Failure(`The function returned what JSON cannot hold: ${error.message}.`);
  }
  if (text === undefined) throw new Failure(`The function returned what JSON cannot hold: a ${typeof result}.`);
  return text;
}

// The frames, one by one, as they come.
async function* frames() {
  let parts = [];
  let size = 0;
  let wanted = HEADER;
  for await (const part of channel) {
    parts.push(part);
    size += part.length;
    while (size >= wanted) {
      const all = parts.length === 1 ? parts[0] : Buffer.concat(parts);
      [parts, size] = [[all], all.length];
      wanted = HEADER + all.readUInt32BE(5);
      if (size < wanted) break;
      yield { number: all.readUInt32BE(1), body: all.subarray(HEADER, wanted) };
      const rest = all.subarray(wanted);
      [parts, size, wanted] = [[rest], rest.length, HEADER];
    }
  }
}

// What a timer or a promise throws that nobody waits for: the call has no answer then, and the state is anybody's guess.
process.on("uncaughtException", (error) => {
  if (current) fail(current, error, () => process.exit(1));
  else {
    console.error(error);
    process.exit(1);
  }
});

send("A", 0, Buffer.alloc(0));
let program;
let handler;
let facts;
for await (const { number, body } of frames()) {
  if (!facts) {
    facts = JSON.parse(body);
    continue;
  }
  current = number;
  try {
    if (handler) {
      send("A", number, await answer(handler, body, new Context({ ...program, ...facts })));
    } else {
      const { environment, entrypoint, ...rest } = facts;
      program = rest;
      Object.assign(process.env, environment);
      handler = await load(entrypoint);
      send("A", number, Buffer.alloc(0));
    }
  } catch (error) {
    fail(number, error, handler ? undefined : () => process.exit(1));
  }
  current = 0;
  facts = undefined;
}
process.exit(0); // the host has gone
